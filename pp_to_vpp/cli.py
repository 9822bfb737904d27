"""The command line: prints what is done; ``progress`` shows it while it is."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TextIO

from . import __version__, outputs, report
from .errors import ConversionError, CopyError, UsageError, refusals
from .options import CRC32, NO_CHECKSUMS, Depth, Options, Task
from .progress import Progress, is_watched
from .report import Call
from .run.ready import ready

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from .report import Done
    from .run.listener import Listener
    from .run.plan import Plan

logging.getLogger("pp_to_vpp").addHandler(logging.NullHandler())  # a call may be refused before

INTERRUPTED = 130
"""Exit status after Ctrl-C or SIGTERM."""
_SHORT_USAGE = """\
usage: pp_to_vpp --load-iteration-dir DIR --save-iteration-dir DIR
                 --target-virtual-pipeline-model-parallel-size V [options]; see --help
       pp_to_vpp --load-iteration-dir DIR describes a checkpoint"""
_EPILOG = """\
exit status: 0 done, 1 unexpected error, 2 wrong call, 3 impossible layout, 4 unreadable or
unsupported checkpoint, 5 copying failed, 6 verification failed, 130 interrupted.
Without a target layout, an existing --save-iteration-dir is verified against the source; without
both, the checkpoint is described. Each DIR may be the root of a checkpoint: then the iteration is
meant that its tracker names."""


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


def parser() -> _Parser:
    """Fills an ``Options``: each ``dest`` is one of its fields, defaults are there. Completion for
    shells is made of it too (see docs/install.md)."""
    made = _Parser(
        prog="pp_to_vpp",
        description="Rewrite a Megatron-LM checkpoint (--ckpt-format torch) from one pipeline "
        "layout into another: plain to virtual (interleaved) pipeline parallelism and back.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    add = made.add_argument_group("source and target").add_argument
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
    add = made.add_argument_group("target layout").add_argument
    for kind in ("pipeline-model", "data"):
        add(
            f"--target-{kind}-parallel-size",
            dest=f"target_{kind[0]}p_size",
            type=_positive,
            metavar="N",
            help=f"{kind.replace('-', ' ')} parallel size of the target [default: the source's]",
        )
    add(
        "--target-virtual-pipeline-model-parallel-size",
        dest="target_vp_size",
        type=_positive,
        metavar="V",
        help="virtual stages per pipeline rank; 1 means plain pipeline parallelism",
    )
    for end in ("first", "last"):
        add(
            f"--target-decoder-{end}-pipeline-num-layers",
            dest=f"{end}_layers",
            type=_positive,
            metavar="n",
            help=f"layers of the {end} pipeline stage of the target; the others get equal shares",
        )
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
    add(
        "--no-save-optim",
        action="store_true",
        help="leave the optimizer state out of the target, for --no-load-optim runs",
    )
    add = made.add_argument_group("running").add_argument
    add(
        "--num-max-processing-processes",
        dest="processes",
        type=_positive,
        metavar="N",
        help="worker processes [default: as many as this process has cores, up to 8]",
    )
    add(
        "--share",
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
    add(
        "--picture",
        type=Path,
        metavar="FILE",
        help="draw what moves (.svg, .png, .pdf; needs matplotlib)",
    )
    for option, what in (
        ("--report", "write a JSON report of what was done"),
        ("--log-file", "write the log to a file too"),
    ):
        add(option, type=Path, metavar="FILE", help=f"{what}; - is standard output")
    return made


def main(arguments: Sequence[str]) -> int:
    """Run the program; its exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a path may have letters that it has not
            stream.reconfigure(errors="backslashreplace")
    call = Call(tuple(arguments), time.time())
    try:
        with refusals(None, "cannot be used"):
            called = parser().parse_args(arguments, Options(Path()))
            given = ready(called)
            _check_outputs(called, given)
    except ConversionError as error:
        status = _refuse(error, _report_of_wrong_call(arguments), call)
        if isinstance(error, UsageError):
            print(_SHORT_USAGE, file=sys.stderr)
        return status
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, _interrupt)
    try:
        with _log_and_plan(given):
            return _guarded_run(given, call)
    except ConversionError as error:  # of the log itself
        return _refuse(error, given.report, call)


def _report_of_wrong_call(arguments: Sequence[str]) -> Path | None:
    """Where a call that cannot be understood wants its report, if it says so and may."""
    bare = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option, field in (
        ("--load-iteration-dir", "load_dir"),
        ("--save-iteration-dir", "save_dir"),
        ("--report", "report"),
    ):
        bare.add_argument(option, dest=field, type=Path)
    try:
        given, _ = bare.parse_known_args(arguments, Options(Path()))
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


def _guarded_run(given: Options, call: Call) -> int:
    """Run; the exit status of whatever happens."""
    try:
        with refusals(None, "cannot be used"):  # what no nearer place has told
            done = _run(given)
            from . import picture, screen  # --help must not wait for numpy

            screen.show(done, given)
            if given.picture is not None and not _is_told_by_another(done):
                source, target = done.layouts
                outputs.write_output(given.picture, picture.drawn(source, target, given.picture))
            if given.report is not None:
                outputs.write_output(given.report, report.of(done, call))
    except ConversionError as error:
        return _refuse(error, given.report, call)
    except KeyboardInterrupt:
        print("pp_to_vpp: interrupted; run again with --resume to go on", file=sys.stderr)
        return INTERRUPTED
    except Exception:  # the last resort: an error of this program
        traceback.print_exc()
        print("pp_to_vpp: this is an error of the program, please report it", file=sys.stderr)
        return ConversionError.exit_status
    return 0


def _refuse(error: ConversionError, path: Path | None, call: Call) -> int:
    """Print one line per problem, which are a result too: the report, if one is wanted, tells
    them. The exit status of their kind."""
    for line in error.problems:
        print(f"pp_to_vpp: error: {line}", file=sys.stderr)
        logging.getLogger("pp_to_vpp").error("%s", line)
    if path is not None:
        with contextlib.suppress(CopyError):  # the lines have said all
            outputs.write_output(path, report.of_refusal(error, call))
    return error.exit_status


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _check_outputs(called: Options, given: Options) -> None:
    """Refuse before hours of copying what cannot be written beside the target.

    Args:
        called: with the folders that the call names.
        given: with the iteration folders that are meant.

    Raises:
        UsageError: it cannot be.
    """
    for option, path in (
        ("--report", given.report),
        ("--log-file", given.log_file),
        ("--picture", given.picture),
    ):
        reason = _why_unwritable(path, called, given)
        if reason is not None:
            raise UsageError(f"{option} {path}: cannot be written ({reason})")
    if given.picture is not None:
        from . import picture  # --help must not wait for it

        picture.check_drawing(given.picture)


def _why_unwritable(path: Path | None, *calls: Options) -> str | None:
    """Why what a call wants written cannot be; None if it can, or nothing is wanted."""
    named = (folder for call in calls for folder in (call.load_dir, call.save_dir))
    folders = dict.fromkeys(folder for folder in named if folder is not None)
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


def _run(given: Options) -> Done:
    """Do what is asked for."""
    from . import screen  # --help must not wait for numpy
    from .run.convert import convert, plan
    from .run.inspect_checkpoint import inspect
    from .run.listener import Listener
    from .run.verify_pair import verify_existing
    from .run.workers import settle_in

    settle_in()
    tasks: dict[Task, Callable[[Options, Listener], Done]] = {
        Task.INSPECT: inspect, Task.PLAN: plan, Task.CONVERT: convert, Task.VERIFY: verify_existing,
    }  # fmt: skip
    with Progress(is_quiet=given.is_quiet or given.is_verbose) as progress:
        listener = progress.listen(Listener())

        def planned(found: Plan) -> None:
            progress.close()
            if given.is_dry_run or not _is_told_by_another(found):
                screen.show_plan(found)

        listener.planned = planned
        return tasks[given.task](given, listener)


def _is_told_by_another(done: Done) -> bool:
    """Whether this is one of several processes of a conversion, and not the first."""
    from .run.plan import Plan

    plan = getattr(done, "plan", done)
    return isinstance(plan, Plan) and not plan.writes_tracker
