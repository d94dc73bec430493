"""Which retain rows gates read, and that a row taken from the retain set is gone from the cache."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import make_tiny_model

from models import gate
from models.errors import DatasetError
from models.examples import Example
from models.gate_rows import GateRows, space_source
from models.llm import FrozenLLM
from models.row_cache import CacheFolder
from models.text_states import text_states

RETAIN = [Example(f"a bad story {i * i} " + "with plot " * (i % 4), "negative") for i in range(40)]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLLM:
    return FrozenLLM.load(str(make_tiny_model(tmp_path_factory.mktemp("m"))), quantization="none", device="cpu")


def _sides(llm: FrozenLLM, retain: list[Example], count: int) -> tuple[list[str], list[str]]:
    rows = GateRows(llm, retain, count)
    sides = (rows.space_rows, rows.calibration_rows, rows.check_rows)
    space, calibration, check = ([retain[i].text for i in side] for side in sides)
    return space, calibration, check


@settings(max_examples=30, deadline=None)
@given(order=st.permutations(range(len(RETAIN))), count=st.integers(8, 50))
def test_the_same_rows_whatever_the_order(llm: FrozenLLM, order: list[int], count: int) -> None:
    assert _sides(llm, [RETAIN[i] for i in order], count) == _sides(llm, RETAIN, count)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1 << 30), gone=st.integers(0, 25))
def test_rows_that_are_taken_away_move_no_other_row(llm: FrozenLLM, seed: int, gone: int) -> None:
    before = _sides(llm, RETAIN, 16)
    unrelated = [e for e in RETAIN if e.text not in {text for side in before for text in side}]
    taken = random.Random(seed).sample(unrelated, min(gone, len(unrelated)))
    assert _sides(llm, [e for e in RETAIN if e not in taken], 16) == before
    # Also when a chosen row goes: the others stay, on their side and in their order, and the next one follows.
    chosen = random.Random(seed).choice(before[0])
    space, *others = _sides(llm, [e for e in RETAIN if e.text != chosen], 16)
    assert space[: len(before[0]) - 1] == [text for text in before[0] if text != chosen]
    assert tuple(others) == before[1:]


def test_the_sides_are_disjoint_different_texts_within_the_count(llm: FrozenLLM) -> None:
    doubled = [*RETAIN, *RETAIN]
    for count in (8, 13, 16, 1000):
        space, calibration, check = _sides(llm, doubled, count)
        assert len({*space, *calibration, *check}) == len(space) + len(calibration) + len(check)
        assert len(space) <= count // 2 and len(calibration) <= count // 4 and len(check) <= count // 4
    everything = sorted(space + calibration + check)
    assert everything == sorted(e.text for e in RETAIN), "with room for all, all are read"
    assert _sides(llm, doubled, 16) == _sides(llm, RETAIN, 16)


@pytest.mark.parametrize("retain", [[], RETAIN[:1], [Example("one and the same")] * 50])
def test_too_few_rows_are_refused(llm: FrozenLLM, retain: list[Example]) -> None:
    with pytest.raises(DatasetError, match="too few different texts"):
        GateRows(llm, retain, 16)
    with pytest.raises(DatasetError, match="too few different texts"):
        GateRows(llm, RETAIN, 7)


def test_states_are_those_of_the_texts(llm: FrozenLLM) -> None:
    rows = GateRows(llm, RETAIN, 16)
    wanted = text_states(llm, [RETAIN[i].text for i in (3, 1, 3)])
    torch.testing.assert_close(rows.states([3, 1, 3]), wanted, rtol=1e-4, atol=1e-5)


def test_a_row_that_left_the_retain_set_leaves_the_file(llm: FrozenLLM, tmp_path: Path) -> None:
    kept = CacheFolder(tmp_path, b"key")
    rows = GateRows(llm, RETAIN, 16, kept)
    rows.fit_space()
    states = rows.states(rows.calibration_rows)
    (file,) = tmp_path.iterdir()
    gone = RETAIN[rows.space_rows[0]]
    left = [e for e in RETAIN if e != gone]

    def stored() -> set[bytes]:
        return {name.tobytes() for name in np.load(file)["names"]}

    assert kept.name(gone.text) in stored()
    again = GateRows(llm, left, 16, kept)
    assert torch.equal(again.states(again.calibration_rows), states), "read back, bit for bit"
    assert kept.name(gone.text) not in stored()
    assert stored() <= {kept.name(e.text) for e in left}
    assert [f.name for f in tmp_path.iterdir()] == [f"gate-{llm.fingerprint[:32]}.npz"]


def test_the_space_is_fitted_on_its_own_side_only(llm: FrozenLLM, tmp_path: Path) -> None:
    kept = CacheFolder(tmp_path, b"key")
    rows = GateRows(llm, RETAIN, 16, kept)
    space = rows.fit_space()
    wanted = gate.fit_space(rows.states(rows.space_rows), 2, fingerprint=llm.fingerprint)
    assert space.digest == wanted.digest
    assert GateRows(llm, RETAIN, 16, kept).fit_space().digest == space.digest


def test_nearest_are_the_space_rows_with_the_largest_cosines(llm: FrozenLLM) -> None:
    rows = GateRows(llm, RETAIN, 30)
    space = rows.fit_space()
    target = rows.space_rows[4]
    direction = space.points(rows.states([target]))[0]
    near = rows.nearest(space, direction.unsqueeze(0), 5)
    scores = {i: float(space.points(rows.states([i]))[0] @ direction) for i in rows.space_rows}
    assert near[0] == target
    assert near == sorted(scores, key=lambda i: -scores[i])[:5]
    assert sorted(rows.nearest(space, direction.unsqueeze(0), 1000)) == sorted(rows.space_rows)


def test_a_source_names_everything_that_makes_a_space(llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    source = space_source(llm, RETAIN, 16)
    assert source == space_source(llm, list(RETAIN), 16)
    whitened = GateRows(llm, RETAIN, 16).space_rows
    without = [row for i, row in enumerate(RETAIN) if i != whitened[0]]
    calibrating = [row for i, row in enumerate(RETAIN) if i != GateRows(llm, RETAIN, 16).calibration_rows[0]]
    assert source == space_source(llm, calibrating, 16), "a row that only calibrates has no part in the space"
    others = {space_source(llm, RETAIN, 8), space_source(llm, without, 16)}
    monkeypatch.setattr(gate, "RIDGE", 0.5)
    others.add(space_source(llm, RETAIN, 16))
    assert len(others | {source}) == 4
