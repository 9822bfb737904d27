"""Any way through any layouts: source -> A -> B is source -> B, and back again is the source.

What holds is stronger than equal tensors: all records of all files are the same to the byte and
lie in the same places, but for the serialization id, a hash of its own history.
"""

from __future__ import annotations

import itertools
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st

from pp_to_vpp.megatron.forms import Ends, LayoutString
from pp_to_vpp.megatron.optimizer_chain import OptimizerKind
from pp_to_vpp.megatron.placement import Placement
from pp_to_vpp.options import Depth
from pp_to_vpp.source.survey import take_survey

from .compare import differences
from .examples import examples
from .families import SIDES, family, iteration
from .inline import run
from .pairs import BERT, DENSE, EACH_KIND, LAYOUT, MOE, ODD, names, pair
from .strategies import targets

_IDENTITY = ".data/serialization_id"
_WITHOUT_SHRINKING = (Phase.explicit, Phase.generate)
"""A failure is told as it was found: making it smaller takes minutes."""
_ONE = settings(examples(1), phases=_WITHOUT_SHRINKING)
_FEW = settings(examples(4), phases=_WITHOUT_SHRINKING)


def records(path: Path) -> dict[str, tuple[int, bytes]]:
    """Place and bytes of each record but the identity, by the standard library's reader."""
    with zipfile.ZipFile(path) as file:
        found = {info.filename.partition("/")[2]: info for info in file.infolist()}
        return {
            name: (info.header_offset, file.read(info))
            for name, info in found.items()
            if name != _IDENTITY
        }


def differing(one: Path, other: Path) -> list[str]:
    """Files of other sizes, and records of other bytes or places (``@``)."""
    found = []
    paths = [sorted(p.relative_to(side) for p in side.glob("*/*")) for side in (one, other)]
    assert paths[0] == paths[1]
    for path in paths[0]:
        ours, theirs = records(one / path), records(other / path)
        assert list(ours) == list(theirs), path
        found += [f"{path}: {name}" for name in ours if ours[name][1] != theirs[name][1]]
        found += [f"{path}: @{name}" for name in ours if ours[name][0] != theirs[name][0]]
        if (one / path).stat().st_size != (other / path).stat().st_size:
            found.append(f"{path}: size")
    return found


@st.composite
def splits(draw: st.DrawFn, first: int, last: int, middle: int) -> Placement:
    """Layers of the end ranks on virtual stages of any sizes, as the fork allows."""
    vp_size = draw(st.sampled_from([v for v in (2, 4) if middle % v == 0]))

    def split(count: int) -> tuple[int, ...]:
        cuts = draw(st.sets(st.integers(1, count - 1), min_size=vp_size - 1, max_size=vp_size - 1))
        ends = [0, *sorted(cuts), count]
        return tuple(b - a for a, b in itertools.pairwise(ends))

    return Placement(vp_size, Ends(first, last, split(first), split(last)))


def placements(name: str) -> st.SearchStrategy[Placement]:
    """Targets of a pair; splits where its source has them."""
    arguments = family(name, "source").megatron.arguments
    own = arguments.placement.form
    if isinstance(own, Ends) and own.first is not None and own.last is not None:
        rest = arguments.num_layers - own.first - own.last
        return splits(own.first, own.last, rest // (arguments.pp_size - 2))
    return targets(arguments)


def draw_way(data: st.DataObject, name: str, side: str) -> tuple[Placement, Placement]:
    """Two layouts other than the source's and than each other."""
    own = family(name, side).megatron
    first, second = data.draw(placements(name)), data.draw(placements(name))
    ways = (own.arguments.placement, first, second)
    start, middle, end = (own.relaunched(one, overlaps=False).layout for one in ways)
    assume(start != middle != end != start)
    return first, second


def check_round_trip(name: str, side: str, first: Placement, second: Placement) -> None:
    own = family(name, side).megatron.arguments.placement
    origin = iteration(name, side)
    with tempfile.TemporaryDirectory() as folder:
        a, b, direct, back = (Path(folder) / word / "iter_0000001" for word in "abcd")
        run(origin, a, first)
        run(a, b, second)
        run(origin, direct, second)
        run(b, back, own)
        assert differing(b, direct) + differing(back, origin) == []


@pytest.mark.parametrize("name", [name for name in names() if name not in EACH_KIND])
@_ONE
@given(data=st.data())
def test_there_and_back_by_some_way(name: str, data: st.DataObject) -> None:
    check_round_trip(name, "source", *draw_way(data, name, "source"))


@pytest.mark.parametrize("name", EACH_KIND)
@_FEW
@given(data=st.data())
def test_there_and_back_by_any_way(name: str, data: st.DataObject) -> None:
    check_round_trip(name, "source", *draw_way(data, name, "source"))


@pytest.mark.parametrize("name", [DENSE, LAYOUT])
@_FEW
@given(data=st.data())
def test_virtual_stages_come_back_too(name: str, data: st.DataObject) -> None:
    """From what Megatron saved with virtual stages, through any two layouts, and back."""
    check_round_trip(name, "truth", *draw_way(data, name, "truth"))


def test_steps_that_come_back_are_written_as_before(tmp_path: Path) -> None:
    """A way through a rank without experts: the pickles, too, should be the source's."""
    source = pair(MOE).source
    there, back = tmp_path / "there" / "iter_0000001", tmp_path / "back" / "iter_0000001"
    run(source, there, Placement(2, LayoutString("E|tt||ttttttL")))
    run(there, back, Placement(1))
    assert differences(back, source, source) == []
    assert differing(back, source) == []


def test_groups_from_other_ranks_share_the_default_betas() -> None:
    """A way through a rank with the embedding alone, which has one of the two param groups."""
    first = Placement(1, LayoutString("E|ttttttttL"))
    check_round_trip(ODD, "source", first, Placement(3, LayoutString("E|tt||t||tttttL")))


def test_layers_keep_their_name_behind_a_chunk_without_layers() -> None:
    """BERT's stand in ``encoder``, as the first chunk of the first way does not show."""
    first = Placement(3, LayoutString("E||t|t||ttL"))
    check_round_trip(BERT, "source", first, Placement(1, LayoutString("Ettt|tL")))


def test_layout_strings_reach_checkpoints_of_old_versions(tmp_path: Path) -> None:
    """The program notes that a newer version is needed to launch, so it must write the layout."""
    source, layout = pair(ODD).source, "Et|tt|ttt|ttL"
    target, back = tmp_path / "there" / "iter_0000001", tmp_path / "back" / "iter_0000001"
    run(source, target, Placement(2, LayoutString(layout)), Depth.STRUCTURE)
    assert take_survey(str(target)).arguments.placement.form == LayoutString(layout)
    run(target, back, Placement(1), Depth.STRUCTURE)
    assert [text for text in differences(back, source, source) if "/args" not in text] == []


def test_the_pairs_cover_what_the_round_trips_are_about() -> None:
    kinds = {family(name, side).kind for name, side in SIDES}
    assert kinds == set(OptimizerKind)
    assert any(family(name, "source").has_expert_optimizer for name in names())
    assert any(family(name, "source").megatron.arguments.mtp_num_layers for name in names())
