"""Another number of pipeline ranks, and with it of data-parallel ranks: compared with what Megatron
saved, there and back, whole and in parts."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from pp_to_vpp.errors import CheckpointError, ConversionError, LayoutError, UsageError
from pp_to_vpp.run import verify_pair
from pp_to_vpp.run.listener import Listener
from pp_to_vpp.source.files import read_torch_file
from pp_to_vpp.source.survey import take_survey

from .compare import differences_of_sizes, load
from .edit import copy_of, flip_byte, rewrite_all, set_arguments
from .examples import FACTOR
from .families import read_family
from .pairs import DENSE, MOE, PLAIN, names, pair
from .runs import Program
from .sizes import (
    HYBRID_ONE,
    LAYER_WISE_SIZES,
    MTP_ONE,
    PIPED,
    TIED_ONE,
    UNEVEN,
    WAYS,
    options,
    run,
    way,
)
from .test_round_trip import differing

PP, DP, VPP = (
    f"--target-{kind}-parallel-size"
    for kind in ("pipeline-model", "data", "virtual-pipeline-model")
)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "iter_0000001"


@pytest.mark.parametrize(("name", "side"), WAYS)
def test_a_conversion_is_what_megatron_saved(name: str, side: str, target: Path) -> None:
    case = way(name, side)
    run(case.source, target, *case.options, "--verify", "full")
    assert differences_of_sizes(target, case.truth, case.source) == []


@pytest.mark.parametrize(("name", "side"), [(PIPED, "source"), (LAYER_WISE_SIZES, "source")])
def test_the_way_back_is_the_source(name: str, side: str, tmp_path: Path) -> None:
    """To the byte: random states of the last ranks are those of the first on the way back."""
    there, back = tmp_path / "there" / "iter_0000001", tmp_path / "back" / "iter_0000001"
    case, other = way(name, side), way(name, "truth")
    run(case.source, there, *case.options)
    run(there, back, *other.options)
    assert differences_of_sizes(back, case.source, there) == []


SIZES = [(name, size) for name in ([MOE, PLAIN] if FACTOR == 1 else names()) for size in (1, 2)]


@pytest.mark.parametrize(("name", "which"), SIZES)
def test_through_another_number_of_ranks_and_back(name: str, which: int, tmp_path: Path) -> None:
    """All bytes come back, but for random states; where copies of the embedding differ, as no
    training leaves them, they are not dropped."""
    source = pair(name).source
    own = take_survey(str(source)).arguments
    size = 1 if which == 1 else 2 * own.pp_size
    there, back = tmp_path / "there" / "iter_0000001", tmp_path / "back" / "iter_0000001"
    try:
        run(source, there, PP, str(size))
        run(there, back, PP, str(own.pp_size))
    except ConversionError as refusal:
        found = str(refusal)
    else:
        assert differences_of_sizes(back, source, there) == []
        return
    reasons = "do not divide|is not equal to the embedding's|not trained as|others than the source"
    assert re.search(reasons, found), found


@pytest.mark.parametrize("name", [PIPED, MTP_ONE, LAYER_WISE_SIZES])
def test_single_ranks_and_shares_make_the_same(name: str, tmp_path: Path) -> None:
    """They speak of the target's ranks, of which there may be more than the source has."""
    case = way(name, "truth")
    whole, ranks, shares = (tmp_path / word / "iter_0000001" for word in ("a", "b", "c"))
    run(case.source, whole, *case.options)
    for pp_rank in reversed(range(take_survey(str(whole)).arguments.pp_size)):
        run(case.source, ranks, *case.options, "--pipeline-ranks-to-process", str(pp_rank))
    for share in ("1/2", "0/2"):
        run(case.source, shares, *case.options, "--share", share)
    assert differing(ranks, whole) + differing(shares, whole) == []


def test_a_run_goes_on_where_it_ended(target: Path, tmp_path: Path) -> None:
    case, whole = way(PIPED, "truth"), tmp_path / "whole" / "iter_0000001"
    run(case.source, whole, *case.options)
    run(case.source, target, *case.options, "--pipeline-ranks-to-process", "3")
    with pytest.raises(UsageError, match="the target exists already"):
        run(case.source, target, *case.options)
    with pytest.raises(UsageError, match="another conversion writes, or wrote, this target"):
        run(case.source, target, *case.options, DP, "2", "--resume")
    run(case.source, target, *case.options, "--resume")
    assert differing(target, whole) == []


def test_folders_of_another_number_of_ranks_are_refused(target: Path) -> None:
    case = way(TIED_ONE)
    shutil.copytree(case.source / "mp_rank_00", target / "mp_rank_00")
    with pytest.raises(UsageError, match="mp_rank_00: the target will have no such rank folder"):
        run(case.source, target, *case.options)


@pytest.mark.parametrize("name", [TIED_ONE, MTP_ONE])
def test_a_changed_byte_of_a_made_copy_is_found(name: str, target: Path) -> None:
    side = "source" if name == TIED_ONE else "truth"
    case = way(name, side)
    run(case.source, target, *case.options)
    model = target / ("mp_rank_00_001" if name == TIED_ONE else "mp_rank_00_001_000")
    file = read_torch_file(model / "model_optim_rng.pt")
    family = take_survey(str(target)).family((0, 0))
    found = next(read_family(family.read([1])))
    wanted = "output_layer.weight" if name == TIED_ONE else "word_embeddings.weight (MTP copy)"
    (extent,) = [t.extent for n, t in found.manifest().items() if not n.kind and wanted in n[0]]
    flip_byte(Path(file.path), extent.offset + extent.length // 2)
    with pytest.raises(ConversionError, match=re.escape(f"{wanted} differs from its source")):
        verify_pair.verify_existing(options(case.source, target, "--verify", "full"), Listener())


@pytest.mark.parametrize("place", ["end", "middle"])
def test_copies_that_differ_are_not_dropped(place: str, target: Path, tmp_path: Path) -> None:
    """Not even in one byte that no sample shows."""
    source = copy_of(way(TIED_ONE, "truth").source, tmp_path)
    found = next(read_family(take_survey(str(source)).family((0, 0)).read([1])))
    tensors = {n.kind: t for n, t in found.manifest().items() if n[0] == "output_layer.weight"}
    extent = tensors["exp_avg"].extent
    offset = extent.length - 1 if place == "end" else extent.length // 2
    flip_byte(Path(extent.path), extent.offset + offset, 0x01)
    with pytest.raises(CheckpointError, match=r"output_layer.weight \[exp_avg\] is not equal to"):
        run(source, target, *way(TIED_ONE, "truth").options)
    assert not target.exists()


@pytest.mark.parametrize(
    ("name", "asked", "kind", "reason"),
    [
        (PIPED, (PP, "1", VPP, "2"), LayoutError, "2 virtual stages on one pipeline rank"),
        (PIPED, (PP, "3"), LayoutError, "8 layers do not divide into 3"),
        (PIPED, (PP, "4"), LayoutError, "already has the layout"),
        (MTP_ONE, (DP, "3"), LayoutError, "the ranks of a pipeline stage are no multiple of 2"),
        (PIPED, (PP, "2", "--pipeline-ranks-to-process", "3"), UsageError, "no pipeline rank 3"),
        (
            UNEVEN,
            (PP, "1", "--target-decoder-first-pipeline-num-layers", "3"),
            LayoutError,
            "layers of a first or last pipeline stage where one has all",
        ),
        (
            HYBRID_ONE,
            (PP, "1", "--target-decoder-last-pipeline-num-layers", "3"),
            UsageError,
            "do not place the layers of a hybrid",
        ),
    ],
)
def test_impossible_sizes_are_refused(
    name: str, asked: tuple[str, ...], kind: type[Exception], reason: str, target: Path
) -> None:
    with pytest.raises(kind, match=reason):
        run(way(name).source, target, *asked)
    assert not target.exists()


def test_random_states_of_data_parallel_ranks_do_not_grow(target: Path, tmp_path: Path) -> None:
    source = copy_of(way(TIED_ONE).source, tmp_path)
    set_arguments(source, data_parallel_random_init=True)
    rewrite_all(source, lambda root: root.update(rng_state=root["rng_state"] * 2))
    with pytest.raises(LayoutError, match="more data-parallel ranks than the 2 of the source"):
        run(source, target, PP, "2", DP, "4")
    run(source, target, PP, "2", DP, "1")
    assert len(load(target / "mp_rank_00_001" / "model_optim_rng.pt")["rng_state"]) == 1


def test_states_of_data_loaders_go_with_their_number_of_readers(
    program: Program, target: Path, tmp_path: Path
) -> None:
    source = copy_of(way(TIED_ONE).source, tmp_path)
    name = "train_dataloader_dprank0.pt"
    (source / "mp_rank_00" / name).write_bytes(b"here")
    run(source, target, PP, "2")
    assert [path.parent.name for path in target.glob(f"*/{name}")] == ["mp_rank_00_000"]
    other = tmp_path / "other" / "iter_0000001"
    done = program.convert(source, other, (PP, "2", DP, "1"))
    assert done.status == 0, done
    assert f"not copied, for it is of other ranks: mp_rank_00/{name}" in done.output
    assert not list(other.glob(f"*/{name}"))


def test_what_no_file_tells_is_said(program: Program, target: Path) -> None:
    case = way(TIED_ONE)
    done = program.convert(case.source, target, (PP, "2"))
    assert done.status == 0, done
    for text in (
        "--target-data-parallel-size 1 keeps 2",
        "no file tells random states",
        "output_layer.weight is made of the word embedding",
        "losses differ in their last bits",
    ):
        assert done.output.count(text) == 2, "in the plan, and at the end"
    assert "launch Megatron with: --pipeline-model-parallel-size 2\n" in done.output


def test_words_for_another_number_of_ranks_are_dropped(program: Program) -> None:
    done = program("--load-iteration-dir", way(UNEVEN).source, PP, "1", "--dry-run")
    assert done.status == 0, done
    text = "the source's --decoder-first-pipeline-num-layers 1 is dropped"
    assert text in done.output


def test_one_rank_is_described(program: Program) -> None:
    """With no virtual stages among its choices."""
    done = program("--load-iteration-dir", way(TIED_ONE).source)
    assert done.status == 0, done
    assert "PP 1" in done.output
    assert "--target-virtual" not in done.output
    assert (
        f"    {PP} 2\n        launch Megatron with: --pipeline-model-parallel-size 2" in done.output
    )


def test_equal_copies_prove_that_ranks_belong_together(program: Program, tmp_path: Path) -> None:
    source = copy_of(way(PIPED).source, tmp_path)
    good = program("--load-iteration-dir", source)
    assert "the copies of the word embedding are equal" in good.output
    bad = program("--load-iteration-dir", pair(DENSE).source)
    assert (
        "output_layer.weight is not equal to the word embedding, of which it is a copy"
        in bad.output
    )
