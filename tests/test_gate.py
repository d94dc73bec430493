"""Gates on plain tensors: whitening, calibration, and bytes that are not what they should be."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from models import gate
from models.errors import DatasetError, FingerprintMismatch, InvalidGate
from models.gate import (
    MAX_DIRECTIONS,
    NEVER,
    OWN_RECALL,
    RIDGE,
    Gate,
    GateFit,
    GateSpace,
    best_cosines,
    cosines,
    fit_gate,
    fit_space,
    mean_direction,
)

HERE, THERE = "a" * 64, "b" * 64
LAYERS = 2


@contextmanager
def one_direction() -> Iterator[None]:
    """Whatever the recall, as for texts on one subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "OWN_RECALL", 0.0)
        yield


def _least(scores: Tensor, rate: float) -> float:
    """The least threshold that at most this share of the scores pass."""
    allowed = math.floor(rate * len(scores))
    return -1.0 if allowed >= len(scores) else float(scores.sort(descending=True).values[allowed])


def _states(rows: int, width: int, seed: int) -> Tensor:
    """Correlated, off centre, and the second layer ten times the size of the first."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=torch.Generator().manual_seed(width)) / width**0.5
    states: Tensor = torch.randn(rows, width, generator=generator) @ mix + 3
    states[:, width // 2 :] *= 10
    return states


def _space(rows: int = 60, width: int = 8, seed: int = 0) -> GateSpace:
    return fit_space(_states(rows, width, seed), LAYERS, fingerprint=HERE)


def _plane() -> GateSpace:
    """Two dimensions, nothing to whiten: points are states of unit length."""
    return GateSpace(HERE, torch.zeros(2), torch.ones(2), torch.eye(2), torch.zeros(2))


def _fit(seed: int = 0, forget: int = 12, rows: int = 50, rate: float = 0.1) -> GateFit:
    space, width = _space(), 8
    return fit_gate(
        _states(forget, width, seed + 1) + 0.5,
        _states(rows, width, seed + 2),
        space,
        digests=[bytes([i]) * 32 for i in range(forget)],
        max_false_claims=rate,
        max_certain_claims=rate / 2,
    )


# --- the space -------------------------------------------------------------------------------------------------------


def _reference_points(rows: Tensor, queries: Tensor, rank: int) -> Tensor:
    """Centre, one size per layer, then S^(-1/2) by an eigendecomposition in float64, all of it written out."""
    rows, queries = rows.double(), queries.double()
    center, width = rows.mean(0), rows.shape[1]
    z = rows - center
    sizes = torch.cat(
        [torch.full((width // LAYERS,), float(half.norm(dim=1).mean())).double() for half in z.chunk(LAYERS, 1)]
    )
    z = z / sizes
    values, vectors = torch.linalg.eigh(z.T @ z / len(z))
    values = values.clamp_min(0)
    if rank < width:
        values[: width - rank] = values[: width - rank].mean()
    values = values + RIDGE * (z.pow(2).sum() / len(z)) / width
    whitened: Tensor = ((queries - center) / sizes) @ vectors @ torch.diag(values.rsqrt()) @ vectors.T
    return torch.nn.functional.normalize(whitened, dim=1)


@pytest.mark.parametrize(("rows", "width"), [(500, 12), (20, 12), (12, 12), (9, 12), (30, 64)])
def test_points_are_those_of_the_inverse_root_of_the_covariance(rows: int, width: int) -> None:
    data, queries = _states(rows, width, 1), _states(7, width, 2)
    space = fit_space(data, LAYERS, fingerprint=HERE)
    assert space.basis.shape == (width, min(rows, width))
    wanted = _reference_points(data, queries, min(rows, width))
    torch.testing.assert_close(space.points(queries).double(), wanted, rtol=0, atol=2e-4)


@pytest.mark.parametrize("rows", [500, 40])
def test_directions_past_the_rank_share_one_variance(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_RANK", 5)
    width = 12 if rows == 500 else 64
    data, queries = _states(rows, width, 1), _states(7, width, 2)
    space = fit_space(data, LAYERS, fingerprint=HERE)
    assert space.basis.shape == (width, 5)
    wanted = _reference_points(data, queries, 5)
    torch.testing.assert_close(space.points(queries).double(), wanted, rtol=0, atol=2e-4)


def test_the_covariance_of_whitened_rows_is_the_identity_on_the_leading_directions() -> None:
    space = fit_space(_states(4000, 12, 1), LAYERS, fingerprint=HERE)
    z = (_states(4000, 12, 2) - space.center) * space.scale  # rows that it was not fitted on
    plain = z.T @ z / len(z)
    z = z + ((z @ space.basis) * space.gain) @ space.basis.T
    torch.testing.assert_close(space.points(_states(4000, 12, 2)), z / z.norm(dim=1, keepdim=True))

    def unevenness(covariance: Tensor) -> tuple[float, float]:
        leading = space.basis[:, -6:]
        c = leading.T @ covariance @ leading
        c = c / c.diagonal().mean()
        return float(c.diagonal().max() - c.diagonal().min()), float((c - c.diagonal().diag()).abs().max())

    assert max(unevenness(z.T @ z / len(z))) < 0.12
    assert max(unevenness(plain)) > 0.5, "the rows were white before"


def test_both_branches_agree_on_the_same_data() -> None:
    """Rows repeated have the same mean and covariance, and are more than the width."""
    few, queries = _states(20, 48, 1), _states(30, 48, 2)
    one = fit_space(few, LAYERS, fingerprint=HERE)
    two = fit_space(few.repeat(4, 1), LAYERS, fingerprint=HERE)
    assert (one.basis.shape, two.basis.shape) == ((48, 20), (48, 48))
    a, b = one.points(queries), two.points(queries)
    torch.testing.assert_close(a @ a.T, b @ b.T, rtol=0, atol=1e-3)
    torch.testing.assert_close(a, b, rtol=0, atol=1e-3)


def test_layers_of_other_sizes_count_alike() -> None:
    data, queries = _states(200, 12, 1), _states(7, 12, 2)
    sizes = torch.cat([torch.full((6,), 0.01), torch.full((6,), 30.0)])
    one = fit_space(data, LAYERS, fingerprint=HERE).points(queries)
    two = fit_space(data * sizes, LAYERS, fingerprint=HERE).points(queries * sizes)
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4)


@given(st.integers(2, 40), st.integers(1, 12), st.integers(0, 1 << 30))
def test_points_have_unit_length(rows: int, half: int, seed: int) -> None:
    space = fit_space(_states(rows, 2 * half, seed), LAYERS, fingerprint=HERE)
    lengths = space.points(_states(9, 2 * half, seed + 1)).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(9))


def test_equal_rows_make_a_space_without_infinities() -> None:
    space = fit_space(torch.ones(5, 4), LAYERS, fingerprint=HERE)
    assert torch.isfinite(space.points(torch.tensor([[1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 1.0]]))).all()
    GateSpace.from_bytes(space.to_bytes(), fingerprint=HERE)


def test_one_row_is_no_space() -> None:
    for rows in (0, 1):
        with pytest.raises(DatasetError, match="two retain rows"):
            fit_space(torch.zeros(rows, 4), LAYERS, fingerprint=HERE)


# --- scores ----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.integers(1, 9), st.integers(1, 20), st.sampled_from([2, 64, 515]))
def test_a_score_does_not_depend_on_how_many_gates_there_are(seed: int, rows: int, gates: int, width: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    points, directions = (
        torch.nn.functional.normalize(torch.randn(n, width, generator=generator)) for n in (rows, gates)
    )
    together = cosines(points, directions)
    alone = torch.cat([cosines(points, d.unsqueeze(0)) for d in directions], 1)
    assert torch.equal(together, alone)
    torch.testing.assert_close(together, points @ directions.T)


# --- fitting ---------------------------------------------------------------------------------------------------------

# Directions from (1, 1)/√2 that calibration rows make: cosines .98995, .70711, -.70711, -.70711.
FORGET = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
CALIBRATION = torch.tensor([[3.0, 4.0], [5.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])


@pytest.mark.parametrize(
    ("rate", "threshold", "claimed", "own_recall", "unseen_recall"),
    [
        # Left out, a forget text scores 0 with the other. Direction (0, 1): rows .8, 0, 0, -1; (1, 0): .6, 1, -1, 0.
        (0.0, 0.989949, [False, False, False, False], 0.0, 0.0),
        (0.25, 0.707107, [True, False, False, False], 0.0, 0.0),
        (0.49, 0.707107, [True, False, False, False], 0.0, 0.0),
        (0.5, -0.707107, [True, True, False, False], 1.0, 0.0),
        (0.75, -0.707107, [True, True, False, False], 1.0, 1.0),
        (1.0, -1.0, [True, True, True, True], 1.0, 1.0),
    ],
)
def test_a_gate_worked_by_hand(
    rate: float, threshold: float, claimed: list[bool], own_recall: float, unseen_recall: float
) -> None:
    digests = [b"\x01" * 32, b"\x02" * 32]
    with one_direction():
        fit = fit_gate(FORGET, CALIBRATION, _plane(), digests=digests, max_false_claims=rate)
    torch.testing.assert_close(fit.gate.directions, torch.tensor([[math.sqrt(0.5)] * 2]))
    assert fit.gate.threshold == pytest.approx(threshold, abs=1e-6)
    assert fit.claimed.tolist() == claimed
    assert fit.false_claim_rate == sum(claimed) / 4
    assert (fit.own_recall, fit.unseen_recall) == (own_recall, unseen_recall)
    assert [bytes(row.tolist()) for row in fit.gate.digests] == digests
    assert fit.gate.space == _plane().digest


@given(st.integers(0, 1 << 30), st.floats(0, 1), st.integers(1, 60), st.booleans())
def test_no_more_calibration_rows_are_claimed_than_allowed_and_no_fewer_than_can_be(
    seed: int, rate: float, rows: int, ties: bool
) -> None:
    space, calibration = _space(), _states(rows, 8, seed)
    if ties:
        calibration = calibration[torch.arange(rows) % max(1, rows // 3)]
    fit = fit_gate(_states(5, 8, seed + 1), calibration, space, digests=[b"1" * 32], max_false_claims=rate)
    scores = best_cosines(space.points(calibration), fit.gate.directions)
    allowed = math.floor(rate * rows)
    assert torch.equal(fit.claimed, scores > fit.gate.threshold)
    assert fit.claimed.sum() <= allowed
    assert fit.false_claim_rate == int(fit.claimed.sum()) / rows
    if allowed == rows:
        assert fit.gate.threshold == -1
    else:
        assert fit.gate.threshold in scores.tolist(), "an order statistic"
        assert (scores >= fit.gate.threshold).sum() > allowed, "a lower one would claim too many"


@settings(max_examples=200)
@given(st.integers(0, 1 << 30), st.floats(0, 1), st.floats(0, 1), st.lists(st.booleans(), min_size=1, max_size=60))
def test_with_the_other_gates_no_more_than_the_cap(seed: int, rate: float, cap: float, others: list[bool]) -> None:
    claimed, rows = torch.tensor(others), len(others)
    space, forget, calibration = _space(), _states(4, 8, seed + 1), _states(rows, 8, seed)
    with one_direction():  # more of them have thresholds of their own
        alone = fit_gate(forget, calibration, space, digests=[], max_false_claims=rate)
        fit = fit_gate(
            forget, calibration, space, digests=[], max_false_claims=rate, claimed=claimed, max_total_claims=cap
        )
    limit = math.floor(cap * rows)
    union = int((fit.claimed | claimed).sum())
    if sum(others) <= limit:
        assert union <= limit
    else:
        assert union == sum(others), "nothing is added to what is too much already"
    assert fit.gate.threshold >= alone.gate.threshold
    assert fit.claimed.sum() <= math.floor(rate * rows)
    if int((alone.claimed | claimed).sum()) <= limit:
        assert fit.gate.threshold == alone.gate.threshold, "the cap takes no more than it must"
    assert (alone.gate.digests.shape, alone.gate.digests.dtype) == ((0, 32), torch.uint8)


@given(st.integers(0, 1 << 30), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1), st.integers(1, 60))
def test_what_a_gate_decides_alone_it_claims_and_is_no_more_than_allowed(
    seed: int, rate: float, certain: float, cap: float, rows: int
) -> None:
    space, forget, calibration = _space(), _states(4, 8, seed + 1), _states(rows, 8, seed)
    others = torch.arange(rows) % 5 == 0
    fit = fit_gate(
        forget,
        calibration,
        space,
        digests=[],
        max_false_claims=rate,
        max_certain_claims=certain,
        claimed=others,
        max_total_claims=cap,
    )
    scores = best_cosines(space.points(calibration), fit.gate.directions)
    alone = scores > fit.gate.certain
    assert alone.sum() <= math.floor(certain * rows)
    assert not (alone & ~fit.claimed).any()
    assert fit.gate.certain == max(fit.gate.threshold, _least(scores, certain))
    never = fit_gate(forget, calibration, space, digests=[], max_false_claims=rate, max_certain_claims=None).gate
    assert never.certain == NEVER > 1


@given(st.integers(0, 1 << 30), st.integers(2, 70), st.integers(5, 40), st.floats(0, 0.6))
@settings(max_examples=40, deadline=None)
def test_unseen_recall_equals_leaving_out_one_text_at_a_time(seed: int, texts: int, rows: int, rate: float) -> None:
    space, forget, calibration = _space(), _states(texts, 8, seed) + 1, _states(rows, 8, seed + 1)
    with one_direction():
        fit = fit_gate(forget, calibration, space, digests=[], max_false_claims=rate)
    points, others = space.points(forget), space.points(calibration)
    hits = []
    for i in range(min(texts, 64)):
        direction = mean_direction(torch.stack([p for k, p in enumerate(points) if k != i]))
        scores = sorted((float(p @ direction) for p in others), reverse=True)
        allowed = math.floor(rate * rows)
        threshold = scores[allowed] if allowed < rows else -1.0
        own = float(points[i] @ direction)
        assume(abs(own - threshold) > 1e-5)
        hits.append(own > threshold)
    assert fit.unseen_recall == sum(hits) / len(hits)


def test_a_single_text_says_nothing_of_unseen_ones() -> None:
    fit = fit_gate(FORGET[:1], CALIBRATION, _plane(), digests=[b"1" * 32], max_false_claims=0.5)
    assert fit.unseen_recall is None
    assert fit.own_recall == 1


def test_empty_sides_are_refused() -> None:
    for forget, calibration in ((FORGET[:0], CALIBRATION), (FORGET, CALIBRATION[:0])):
        with pytest.raises(DatasetError):
            fit_gate(forget, calibration, _plane(), digests=[], max_false_claims=0.1)


def _subjects(count: int, each: int, width: int = 32) -> tuple[Tensor, Tensor, GateSpace]:
    """Texts on ``count`` subjects that have nothing in common, rows on none of them, and a plain space."""
    axes = torch.eye(width)[:count].repeat_interleave(each, 0)
    generator = torch.Generator().manual_seed(1)
    forget = axes + 0.15 * torch.randn(count * each, width, generator=generator)
    others = torch.randn(400, width, generator=generator)
    ones = torch.ones(width)
    return forget, others, GateSpace(HERE, 0 * ones, ones, torch.eye(width)[:, :1], torch.zeros(1))


def test_texts_on_several_subjects_get_several_directions() -> None:
    forget, others, space = _subjects(8, 5)
    with one_direction():
        single = fit_gate(forget, others, space, digests=[], max_false_claims=0.01)
    fit = fit_gate(forget, others, space, digests=[], max_false_claims=0.01)
    assert single.own_recall < OWN_RECALL <= fit.own_recall
    assert 1 < len(fit.gate.directions) <= 16
    assert fit.claimed.sum() <= 4
    assert fit.unseen_recall is not None and single.unseen_recall is not None
    assert fit.unseen_recall > 0.9 > single.unseen_recall
    torch.testing.assert_close(fit.gate.directions.norm(dim=1), torch.ones(len(fit.gate.directions)))
    again = fit_gate(forget, others, space, digests=[], max_false_claims=0.01)
    assert again.gate.digest == fit.gate.digest, "no chance in it"


def test_texts_on_one_subject_get_one_direction() -> None:
    forget, others, space = _subjects(1, 20)
    assert len(fit_gate(forget, others, space, digests=[], max_false_claims=0.01).gate.directions) == 1


def test_directions_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "MAX_DIRECTIONS", 3)
    forget, others, space = _subjects(16, 2)
    fit = fit_gate(forget, others, space, digests=[], max_false_claims=0.0)
    assert len(fit.gate.directions) == 3 < MAX_DIRECTIONS
    assert fit.own_recall < OWN_RECALL


def test_what_the_cap_takes_is_taken_from_the_estimate_too() -> None:
    forget, others, space = _subjects(1, 20)
    near = others.clone()
    near[:, 0] += 2.5  # calibration rows that the gate would claim, if it could
    free = fit_gate(forget, near, space, digests=[], max_false_claims=0.5)
    full = torch.zeros(len(near), dtype=torch.bool)
    full[:40] = True
    capped = fit_gate(forget, near, space, digests=[], max_false_claims=0.5, claimed=full, max_total_claims=0.1)
    assert free.unseen_recall == 1.0
    assert capped.unseen_recall is not None and capped.unseen_recall < 1.0
    assert capped.gate.threshold > free.gate.threshold


# --- bytes -----------------------------------------------------------------------------------------------------------


@given(st.integers(0, 1 << 30), st.integers(1, 5), st.floats(0, 1))
def test_bytes_round_trip_bit_for_bit(seed: int, forget: int, rate: float) -> None:
    space, own = _space(seed=seed), _fit(seed, forget, rate=rate).gate
    read, again = GateSpace.from_bytes(space.to_bytes(), fingerprint=HERE), Gate.from_bytes(own.to_bytes())
    assert (read.to_bytes(), again.to_bytes()) == (space.to_bytes(), own.to_bytes())
    assert (read.digest, again.digest) == (space.digest, own.digest)
    queries = _states(5, 8, seed + 3)
    assert torch.equal(read.points(queries), space.points(queries))
    assert (again.threshold, again.certain, again.space) == (own.threshold, own.certain, own.space)
    for name in ("directions", "digests"):
        assert torch.equal(getattr(again, name), getattr(own, name))
    assert _space(seed=seed + 1).digest != space.digest


def test_a_space_of_another_model_is_refused() -> None:
    with pytest.raises(FingerprintMismatch):
        GateSpace.from_bytes(_space().to_bytes(), fingerprint=THERE)
    tensors = load(_space().to_bytes())
    with pytest.raises(FingerprintMismatch):
        GateSpace.from_bytes(save(tensors), fingerprint=HERE)
    data = _space().to_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps({**json.loads(data[8 : 8 + size]), "__metadata__": None}).encode()
    with pytest.raises(FingerprintMismatch):
        GateSpace.from_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :], fingerprint=HERE)


BAD_SPACES: dict[str, dict[str, Tensor | None]] = {
    "missing": {"gain": None},
    "extra": {"more": torch.zeros(1)},
    "center": {"center": torch.zeros(7)},
    "scale": {"scale": torch.zeros(9)},
    "gain": {"gain": torch.zeros(7)},
    "basis": {"basis": torch.zeros(8, 7)},
    "turned": {"basis": torch.zeros(64)},
    "nan": {"scale": torch.tensor([float("nan")] * 8)},
    "inf": {"basis": torch.full((8, 8), float("inf"))},
    "float64": {"center": torch.zeros(8, dtype=torch.float64)},
    "integers": {"gain": torch.zeros(8, dtype=torch.int32)},
    "float8": {"gain": torch.zeros(8).to(torch.float8_e4m3fn)},
}


@pytest.mark.parametrize("change", BAD_SPACES.values(), ids=BAD_SPACES)
def test_a_damaged_space_is_refused(change: dict[str, Tensor | None]) -> None:
    tensors = {k: t for k, t in {**load(_space().to_bytes()), **change}.items() if t is not None}
    with pytest.raises(InvalidGate):
        GateSpace.from_bytes(save(tensors, metadata={"fingerprint": HERE}), fingerprint=HERE)


BAD_GATES: dict[str, dict[str, Tensor | None]] = {
    "missing": {"digests": None},
    "extra": {"more": torch.zeros(1)},
    "vector": {"directions": torch.zeros(8)},
    "none": {"directions": torch.zeros(0, 8)},
    "float64": {"directions": torch.zeros(1, 8, dtype=torch.float64)},
    "short-digests": {"digests": torch.zeros(2, 31, dtype=torch.uint8)},
    "float-digests": {"digests": torch.zeros(2, 32)},
    "one-threshold": {"thresholds": torch.zeros(1, dtype=torch.float64)},
    "no-threshold": {"thresholds": torch.zeros(0, dtype=torch.float64)},
    "float32-thresholds": {"thresholds": torch.zeros(2)},
    "nan-threshold": {"thresholds": torch.tensor([0.5, float("nan")], dtype=torch.float64)},
    "nan": {"directions": torch.full((1, 8), float("nan"))},
    "inf": {"directions": torch.full((1, 8), float("inf"))},
    "short-space": {"space": torch.zeros(31, dtype=torch.uint8)},
    "wide-space": {"space": torch.full((32,), 300)},
}


@pytest.mark.parametrize("change", BAD_GATES.values(), ids=BAD_GATES)
def test_a_damaged_gate_is_refused(change: dict[str, Tensor | None]) -> None:
    tensors = {k: t for k, t in {**load(_fit().gate.to_bytes()), **change}.items() if t is not None}
    with pytest.raises(InvalidGate):
        Gate.from_bytes(save(tensors))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidGate):
        Gate.from_bytes(data)
    with pytest.raises(InvalidGate):
        GateSpace.from_bytes(data, fingerprint=HERE)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_shows_in_the_digest(position: int, value: int) -> None:
    own, space = _fit().gate, _space()
    for original, data in ((own, own.to_bytes()), (space, space.to_bytes())):
        changed = bytearray(data)
        changed[position % len(data)] = value
        assume(changed != data)
        read: Gate | GateSpace
        try:
            if isinstance(original, Gate):
                read = Gate.from_bytes(bytes(changed))
            else:
                read = GateSpace.from_bytes(bytes(changed), fingerprint=HERE)
        except (InvalidGate, FingerprintMismatch):
            continue
        assert read.digest != original.digest
        assert len(read.to_bytes()) == len(data)


def test_a_cut_file_is_refused() -> None:
    own, space = _fit().gate.to_bytes(), _space().to_bytes()
    for n in range(0, len(own), 7):
        with pytest.raises(InvalidGate):
            Gate.from_bytes(own[:n])
    for n in range(0, len(space), 7):
        with pytest.raises(InvalidGate):
            GateSpace.from_bytes(space[:n], fingerprint=HERE)
