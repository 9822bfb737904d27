"""The command line: prints what is done; ``progress`` shows it while it is."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import os
import re
import signal
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from . import __version__, outputs
from .errors import ConversionError, CopyError, UsageError
from .options import CRC32, NO_CHECKSUMS, Depth, Options
from .progress import Progress, is_watched, size

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from .run.convert import Outcome, Prepared
    from .run.verify_pair import Verified

logging.getLogger("pp_to_vpp").addHandler(logging.NullHandler())  # a call may be refused before

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM."""
_LISTED_FOLDERS = 64
_BASE_MEGABYTES, _WORKER_MEGABYTES = 50, 30
"""Resident memory, measured: it does not grow with the checkpoint."""
_SHORT_USAGE = """\
usage: pp_to_vpp --load-iteration-dir DIR --save-iteration-dir DIR
                 --target-virtual-pipeline-model-parallel-size V [options]; see --help"""
_EPILOG = """\
exit status: 0 done, 1 unexpected error, 2 wrong call, 3 impossible layout, 4 unreadable or
unsupported checkpoint, 5 copying failed, 6 verification failed, 130 interrupted.
Without a target layout, an existing --save-iteration-dir is verified against the source."""


def _number(text: str) -> int:
    if re.fullmatch(r"-?[0-9]{1,9}", text) is None:
        listed = " (numbers of a list stand apart: 0 1 2)" if "," in text else ""
        raise argparse.ArgumentTypeError(f"{text} is no number{listed}")
    return int(text)


def _positive(text: str) -> int:
    value = _number(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def _folder(text: str) -> Path:
    return Path(text).expanduser()  # as in --option=~/folder, which shells leave alone


def _share(text: str) -> str:
    from .run.share import parse  # --help must not wait for it

    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


class _Parser(argparse.ArgumentParser):
    """A parser whose refusals are those of this program."""

    def error(self, message: str) -> NoReturn:
        """Refuse the call.

        Raises:
            UsageError: always.
        """
        raise UsageError(message + self._meant(message))

    def _meant(self, message: str) -> str:
        """The options that look like those that are unknown."""
        import difflib  # --help must not wait for it

        known = list(self._option_string_actions)
        wrong = re.findall(r"--[\w-]+", message) if message.startswith("unrecognized") else []
        near = [name for text in wrong for name in difflib.get_close_matches(text, known, 1, 0.5)]
        return f"; did you mean {' and '.join(dict.fromkeys(near))}?" if near else ""


def _parser() -> _Parser:
    """Fills an ``Options``: each ``dest`` is one of its fields, defaults are there."""
    parser = _Parser(
        prog="pp_to_vpp",
        description="Rewrite a Megatron-LM checkpoint (--ckpt-format torch) from one pipeline "
        "layout into another: plain to virtual (interleaved) pipeline parallelism and back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add = parser.add_argument_group("source and target").add_argument
    add(
        "--load-iteration-dir",
        dest="load_dir",
        type=_folder,
        required=True,
        metavar="DIR",
        help="iteration folder of the source, e.g. ckpt/iter_0001000",
    )
    add(
        "--follow-links",
        action="store_true",
        help="files of the source may be links to regular files elsewhere",
    )
    add(
        "--save-iteration-dir",
        dest="save_dir",
        type=_folder,
        metavar="DIR",
        help="iteration folder of the target; not needed for --dry-run",
    )
    for kind in ("pipeline", "expert", "tensor"):
        add(
            f"--{kind}-model-parallel-size",
            dest=f"{kind[0]}p_size" if kind != "pipeline" else "pp_size",
            type=_positive,
            metavar="N",
            help=f"{kind} parallel size of the source; taken from the checkpoint, must agree with "
            "it when given",
        )
    add = parser.add_argument_group("target layout").add_argument
    add(
        "--target-virtual-pipeline-model-parallel-size",
        dest="target_vp_size",
        type=_positive,
        metavar="V",
        help="virtual stages per pipeline rank; 1 means plain pipeline parallelism",
    )
    for end in ("first", "last"):
        add(
            f"--target-{end}-virtual-pipeline-num-layers-split",
            dest=f"{end}_split",
            type=_number,
            nargs="+",
            metavar="n",
            help=f"layers of each virtual stage of the {end} pipeline stage (Microsoft's fork); "
            "both or neither",
        )
    add(
        "--target-pipeline-model-parallel-layout",
        dest="layout_string",
        metavar="STR",
        help="Megatron's layout string of the target, e.g. 'Et*3|(tt|)*29,m|L'",
    )
    add(
        "--target-hybrid-layer-pattern",
        dest="hybrid_pattern",
        metavar="STR",
        help="Megatron's pattern of a hybrid model's target, e.g. 'M*|M-|M*|M-'",
    )
    add(
        "--target-overlap-param-gather-with-optimizer-step",
        dest="overlaps",
        action="store_true",
        help="the target run uses this Megatron flag",
    )
    add = parser.add_argument_group("running").add_argument
    add(
        "--num-max-processing-processes",
        dest="processes",
        type=_positive,
        metavar="N",
        help="worker processes [default: as many as this process has cores, up to 8]",
    )
    add(
        "--share",
        type=_share,
        metavar="I/N",
        help="do share I (from 0) of N of the rank folders; auto: as torchrun, srun or mpirun say",
    )
    add(
        "--pipeline-ranks-to-process",
        dest="pp_ranks",
        type=_number,
        nargs="+",
        metavar="r",
        help="only these target pipeline ranks, when several nodes share the work",
    )
    add(
        "--dry-run",
        dest="is_dry_run",
        action="store_true",
        help="print layer table, files, bytes, memory and disk; write nothing",
    )
    add(
        "--verify",
        dest="depth",
        type=Depth,
        choices=list(Depth),
        help="how much of the result is proved before it gets its name [default: structure]",
    )
    add(
        "--checksums",
        choices=(CRC32, NO_CHECKSUMS),
        help="of the records that are written [default: crc32]; none is what torch writes with "
        "set_crc32_options(False), and needs no reading where the file system shares blocks",
    )
    add(
        "--resume",
        action="store_true",
        help="keep rank folders that an earlier run of the same conversion finished",
    )
    add("--quiet", dest="is_quiet", action="store_true", help="say nothing but errors")
    add("--verbose", dest="is_verbose", action="store_true", help="say what each worker has done")
    for option, what in (
        ("--report", "write a JSON report of what was done"),
        ("--log-file", "write the log to a file too"),
    ):
        add(option, type=Path, metavar="FILE", help=f"{what}; - is standard output")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the program; its exit status."""
    parser = _parser()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may have letters that it has not
            stream.reconfigure(errors="backslashreplace")
    try:
        given = parser.parse_args(arguments, Options(Path()))
        _check(given)
    except UsageError as error:
        status = _refuse(error, _report_of_wrong_call(arguments))
        print(_SHORT_USAGE, file=sys.stderr)
        return status
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, _interrupt)
    try:
        with _log_and_plan(given):
            return _guarded_run(given)
    except ConversionError as error:  # of the log itself
        return _refuse(error, given.report)


def _report_of_wrong_call(arguments: Sequence[str]) -> Path | None:
    """Where a call that cannot be understood wants its report, if it says so and may."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option, field in (
        ("--load-iteration-dir", "load_dir"),
        ("--save-iteration-dir", "save_dir"),
        ("--report", "report"),
    ):
        parser.add_argument(option, dest=field, type=Path)
    try:
        given, _ = parser.parse_known_args(arguments, Options(Path()))
    except argparse.ArgumentError:
        return None
    return None if _why_unwritable(given.report, given) else given.report


@contextlib.contextmanager
def _log_and_plan(given: Options) -> Iterator[None]:
    """Open the log; where standard output is asked for, the plan goes to standard error."""
    with contextlib.ExitStack() as stack:
        if given.is_quiet:
            nobody = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nobody))
        elif outputs.STANDARD_OUTPUT in (given.report, given.log_file):
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        log: TextIO | None = None
        if given.log_file is not None:
            log = stack.enter_context(outputs.open_output(given.log_file, append=True))
        stack.enter_context(_logging(log, given))
        yield


def _guarded_run(given: Options) -> int:
    """Run; the exit status of whatever happens."""
    try:
        content = _run(given)
        if given.report is not None:
            outputs.write_report(given.report, json.dumps(content, indent=1) + "\n")
    except ConversionError as error:
        return _refuse(error, given.report)
    except KeyboardInterrupt:
        print("pp_to_vpp: interrupted; run again with --resume to go on", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # the last resort: an error of this program
        traceback.print_exc()
        print("pp_to_vpp: this is an error of the program, please report it", file=sys.stderr)
        return ConversionError.exit_status
    return 0


def _refuse(error: ConversionError, path: Path | None) -> int:
    """Print one line per problem, which are a result too: the report, if one is wanted, tells
    them. The exit status of their kind."""
    from . import report

    for line in error.problems:
        print(f"pp_to_vpp: error: {line}", file=sys.stderr)
        logging.getLogger("pp_to_vpp").error("%s", line)
    if path is not None:
        with contextlib.suppress(CopyError):  # the lines have said all
            outputs.write_report(path, json.dumps(report.of_refusal(error), indent=1) + "\n")
    return error.exit_status


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check(given: Options) -> None:
    """Refuse what contradicts itself before anything is read.

    Raises:
        UsageError: it does.
    """
    first, last, vp_size = given.first_split, given.last_split, given.target_vp_size
    may_verify_only = given.save_dir is not None and given.depth is not Depth.NONE
    if given.verifies_only and (given.is_dry_run or given.resume or not may_verify_only):
        raise UsageError(
            "give --target-virtual-pipeline-model-parallel-size, "
            "--target-pipeline-model-parallel-layout or --target-hybrid-layer-pattern"
        )
    if given.save_dir is None and not given.is_dry_run:
        raise UsageError("--save-iteration-dir is required unless --dry-run is given")
    if (first is None) != (last is None):
        raise UsageError(
            "give both --target-first-... and --target-last-...-num-layers-split, or none"
        )
    if first is not None and last is not None:
        if given.layout_string is not None:
            raise UsageError("give layer splits or a layout string, not both")
        if vp_size is None or {len(first), len(last)} != {vp_size}:
            raise UsageError(
                "each layer split needs one number for each of the "
                "--target-virtual-pipeline-model-parallel-size virtual stages"
            )
        if min(*first, *last) < 1:
            raise UsageError("layer splits are positive numbers")
    for option, path in (("--report", given.report), ("--log-file", given.log_file)):
        reason = _why_unwritable(path, given)
        if reason is not None:
            raise UsageError(f"{option} {path}: cannot be written ({reason})")


def _why_unwritable(path: Path | None, given: Options) -> str | None:
    """Why what a call wants written cannot be; None if it can, or nothing is wanted."""
    folders = [folder for folder in (given.load_dir, given.save_dir) if folder is not None]
    return None if path is None else outputs.why_unwritable(path, folders)


class _LogFile(logging.StreamHandler):  # type: ignore[type-arg] # Python 3.10 has no [TextIO] here
    """A log file. A full disk ends the log, and is told when the run is over."""

    failure: OSError | None = None

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the name is logging's
        """Write to nobody from now on."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and self.failure is None:
            self.failure = error
            with open(os.devnull, "w") as nobody:
                os.dup2(nobody.fileno(), self.stream.fileno())
        elif self.failure is None:
            super().handleError(record)


@contextlib.contextmanager
def _logging(log: TextIO | None, given: Options) -> Iterator[None]:
    """Log to standard error, when nobody watches a bar there, and to a file if one is named."""
    logger = logging.getLogger("pp_to_vpp")
    logger.setLevel(logging.DEBUG if given.is_verbose else logging.INFO)
    logger.propagate = False
    form = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    handlers: list[logging.Handler] = []
    if not given.is_quiet and (given.is_verbose or not is_watched()):
        console = logging.StreamHandler(sys.stderr)
        console.addFilter(lambda record: record.levelno <= logging.INFO)
        handlers.append(console)
    if log is not None:
        handlers.append(_LogFile(log))
        handlers[-1].set_name(str(given.log_file))
    for handler in handlers:
        handler.setFormatter(form)
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
    for handler in handlers:
        if isinstance(handler, _LogFile) and handler.failure is not None:
            raise CopyError.of(
                f"--log-file {handler.name}",
                f"cannot be written ({handler.failure.strerror}); the run went on without it",
                cure="see what it printed",
            )


def _run(given: Options) -> dict[str, object]:
    """Do what is asked for; the report of it."""
    # numpy would start a thread for each core, for nothing, and forking wants a single thread.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from . import report  # --help must not wait for numpy
    from .run.convert import convert
    from .run.listener import Listener
    from .run.share import number_of_workers
    from .run.verify_pair import verify_existing

    with Progress(is_quiet=given.is_quiet or given.is_verbose) as progress:
        listener = progress.listen(Listener())

        def planned(prepared: Prepared) -> None:
            progress.close()
            if prepared.writes_tracker or given.is_dry_run:  # one of several processes tells all
                _print_plan(prepared)

        listener.planned = planned
        if given.verifies_only:
            verified = verify_existing(given, listener)
            progress.close()
            _print_verified(verified)
            return report.of_verification(verified)
        prepared, outcome = convert(given, listener)
    if outcome is None:
        _print_dry_run(prepared, number_of_workers(given.processes))
        return report.of_plan(prepared)
    _print_outcome(prepared, outcome)
    return report.of_conversion(prepared, outcome)


def _say(text: str) -> None:
    """Print a line. A reader that went away, as in ``| head``, must not end a conversion.

    Raises:
        CopyError: standard output is a full disk, or the like.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the rest of the run
        if not isinstance(error, BrokenPipeError):
            cure = "what was copied is whole: send the output elsewhere and use --resume"
            text = f"cannot be written ({error.strerror})"
            raise CopyError.of("standard output", text, cure=cure) from None


def _print_plan(prepared: Prepared) -> None:
    """The layer table and what will be written."""
    survey, target = prepared.survey, prepared.target
    _say(f"source: {survey.path} ({'; '.join(prepared.facts)})")
    _say(_indented(prepared.source.layout.table()))
    _say("target layers (E embedding, M multi-token prediction, L loss):")
    _say(_indented(target.layout.table()))
    files = sum(len(rank.files) for rank in prepared.ranks)
    _say(f"to write: {len(prepared.ranks)} rank folders, {files} files, {size(prepared.length)}")
    if prepared.part is not None:
        part = prepared.part
        _say(
            f"share {part.share}: {len(part.ranks)} rank folders, {size(part.length)}; the largest "
            f"share is {part.largest_over_mean:.2f} x the mean"
        )
    for note in prepared.notes:
        _say(f"note: {note}")


def _print_dry_run(prepared: Prepared, processes: int) -> None:
    """What only a dry run tells: each folder, memory and disk."""
    width = max(len(rank.id.folder) for rank in prepared.ranks)
    for rank in prepared.ranks if len(prepared.ranks) <= _LISTED_FOLDERS else ():
        files = ", ".join(f"{file.name} {size(file.length)}" for file in rank.files)
        _say(f"  {rank.id.folder:<{width}}  {files}")
    memory = _BASE_MEGABYTES + _WORKER_MEGABYTES * processes
    _say(f"memory: about {memory} MB with {processes} workers")
    _say(f"disk: {prepared.length} bytes ({size(prepared.length)})")
    _say(f"launch Megatron with: {prepared.launch_flags}")
    _say("dry run: nothing was written")


def _print_outcome(prepared: Prepared, outcome: Outcome) -> None:
    """What was done, and how to go on."""
    kept = sum(rank.was_kept for rank in outcome.ranks)
    rate = size(outcome.written / max(outcome.seconds, 1e-3))
    share = f"share {prepared.part}: " if prepared.part is not None else ""
    _say(
        f"{share}wrote {len(outcome.ranks) - kept} rank folders, {size(outcome.written)} in "
        f"{outcome.seconds:.1f} s ({rate}/s)"
        + (f"; kept {kept} from an earlier run" if kept else "")
    )
    if not prepared.writes_tracker:
        return
    bare = "; records without checksums" if outcome.checksums == NO_CHECKSUMS else ""
    _say(f"verified: {outcome.depth.value}{bare}")
    _say(f"tracker: {outcome.tracker}")
    _say(f"launch Megatron with: {prepared.launch_flags}")


def _print_verified(verified: Verified) -> None:
    _say(_indented(verified.layout.table()))
    _say(
        f"verified ({verified.depth.value}): {verified.ranks} rank folders, "
        f"{size(verified.length)} in {verified.seconds:.1f} s; every tensor is where it must be"
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
