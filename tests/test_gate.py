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

from models import gate, gate_fit
from models.errors import DatasetError, FingerprintMismatch, InvalidGate
from models.gate import NEVER, RIDGE, Gate, GateSpace, best_cosines, cosines, fit_space
from models.gate_fit import (
    CERTAIN_RISE,
    CLAIM_RISE,
    MAX_DIRECTIONS,
    OWN_RECALL,
    GateFit,
    _left_out_scores,
    fit_gate,
    mean_direction,
    tail_threshold,
)

HERE, THERE = "a" * 64, "b" * 64
LAYERS = 2


@contextmanager
def one_direction() -> Iterator[None]:
    """Whatever the recall, as for texts on one subject."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_fit, "OWN_RECALL", 0.0)
        yield


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


# --- thresholds ------------------------------------------------------------------------------------------------------


def test_a_tail_worked_by_hand() -> None:
    """The ten highest of 200 lie .1 to 1 above the rest: a mean excess of .55, which a share of 5 % passes."""
    scores = torch.tensor([0.0] * 190 + [0.1 * i for i in range(1, 11)])[torch.randperm(200)]
    assert tail_threshold(scores, 0.01) == pytest.approx(0.55 * math.log(5))
    assert tail_threshold(scores, 0.0005) == pytest.approx(min(0.55 * math.log(100), NEVER))
    assert tail_threshold(scores, 0.05) == 0.0, "where the tail begins"
    assert tail_threshold(scores, 0.6) == 0.0 and tail_threshold(scores, 1.0) == -1.0
    assert tail_threshold(scores, 0.0) == NEVER


@given(st.integers(0, 1 << 30), st.integers(1, 400), st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_a_larger_rate_never_has_a_larger_threshold(seed: int, rows: int, rates: list[float]) -> None:
    scores = torch.randn(rows, generator=torch.Generator().manual_seed(seed)) / 5
    found = [tail_threshold(scores, rate) for rate in sorted(rates)]
    assert found == sorted(found, reverse=True)
    for rate, threshold in zip(sorted(rates), found, strict=True):
        if rate * rows >= max(10, 0.05 * rows):  # inside the sample, and so to the letter
            assert (scores > threshold).sum() <= rate * rows


def test_far_out_the_tail_of_an_exponential_is_found() -> None:
    scores = torch.empty(20_000).exponential_(generator=torch.Generator().manual_seed(3)) / 20
    for rate in (1e-3, 1e-4, 1e-5):
        assert tail_threshold(scores, rate) == pytest.approx(-math.log(rate) / 20, rel=0.08)


NO_COPIES = torch.eye(64, dtype=torch.bool)


# --- fitting ---------------------------------------------------------------------------------------------------------

FORGET = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
CALIBRATION = torch.tensor([[3.0, 4.0], [5.0, 0.0], [-1.0, 0.0], [0.0, -1.0]])


def test_a_gate_worked_by_hand() -> None:
    """Direction (1, 1)/√2; the rows score .98995, .70711 and twice -.70711. Two texts leave no gap to rise into."""
    digests = [b"\x01" * 32, b"\x02" * 32]
    with one_direction():
        fit = fit_gate(FORGET, CALIBRATION, _plane(), digests=digests, max_false_claims=0.75, max_certain_claims=0.6)
    torch.testing.assert_close(fit.gate.directions, torch.tensor([[math.sqrt(0.5)] * 2]))
    # Three rows make the tail, above -.70711: the mean excess is (1.69706 + 1.41421 + 0) / 3.
    assert fit.gate.threshold == pytest.approx(-0.707107, abs=1e-6)
    assert fit.gate.certain == pytest.approx(-0.707107 + 1.037092 * math.log(3 / 2.4), abs=1e-5)
    assert fit.own_recall == 1.0
    assert [bytes(row.tolist()) for row in fit.gate.digests] == digests
    assert fit.gate.space == _plane().digest


@given(st.integers(0, 1 << 30), st.floats(0, 1), st.floats(0, 1), st.integers(1, 60), st.integers(1, 9))
def test_what_a_gate_decides_alone_it_claims(seed: int, rate: float, certain: float, rows: int, texts: int) -> None:
    space, forget, calibration = _space(), _states(texts, 8, seed + 1), _states(rows, 8, seed)
    fit = fit_gate(forget, calibration, space, digests=[], max_false_claims=rate, max_certain_claims=certain)
    assert fit.gate.threshold <= fit.gate.certain <= NEVER
    scores = best_cosines(space.points(calibration), fit.gate.directions)
    assert fit.gate.threshold >= tail_threshold(scores, rate)
    never = fit_gate(forget, calibration, space, digests=[], max_false_claims=rate).gate
    assert never.certain == NEVER > 1 and never.threshold == fit.gate.threshold
    assert (never.digests.shape, never.digests.dtype) == ((0, 32), torch.uint8)


def test_thresholds_rise_into_the_gap_that_the_forget_texts_leave() -> None:
    forget, others, space = _subjects(1, 12)
    rates = {"max_false_claims": 0.01, "max_certain_claims": 0.008}
    few, many = (fit_gate(forget[:n], others, space, digests=[], **rates).gate for n in (3, 12))
    tails = [tail_threshold(best_cosines(space.points(others), gate.directions), 0.01) for gate in (few, many)]
    assert few.threshold == tails[0], "three texts say too little"
    lowest = float(_left_out_scores(space.points(forget), torch.zeros(12, dtype=torch.long), NO_COPIES[:12, :12]).min())
    assert many.threshold == pytest.approx(tails[1] + CLAIM_RISE * (lowest - tails[1]))
    assert many.certain == pytest.approx(tails[1] + CERTAIN_RISE * (lowest - tails[1])), "above its own tail"
    # Texts that have no more in common than any others leave none.
    strangers = fit_gate(others[:12], others[12:], space, digests=[], **rates).gate
    scores = best_cosines(space.points(others[12:]), strangers.directions)
    assert strangers.threshold == tail_threshold(scores, 0.01)


@given(st.integers(0, 1 << 30), st.integers(1, 20), st.integers(1, 5))
def test_left_out_scores_equal_leaving_out_one_text_at_a_time(seed: int, texts: int, clusters: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    own = torch.nn.functional.normalize(_states(texts, 8, seed), dim=-1)
    belongs = torch.randint(clusters, (texts,), generator=draw)
    copies = (torch.rand(texts, texts, generator=draw) < 0.1).fill_diagonal_(True)
    found = _left_out_scores(own, belongs, copies)
    for i in range(texts):
        rest = (belongs != belongs[i]) | ~copies[i]  # of another cluster they say something else
        made = [mean_direction(own[rest & (belongs == c)]) for c in belongs[rest].unique().tolist()]
        expected = max((float(own[i] @ direction) for direction in made), default=-1.0)
        assert float(found[i]) == pytest.approx(expected, abs=1e-5)


@given(st.integers(0, 1 << 30), st.integers(5, 24), st.integers(15, 60), st.floats(0.01, 0.6))
@settings(max_examples=30, deadline=None)
def test_unseen_recall_equals_leaving_out_one_text_at_a_time(seed: int, texts: int, rows: int, rate: float) -> None:
    space, forget, calibration = _space(), _states(texts, 8, seed) + 1, _states(rows, 8, seed + 1)
    rates = {"max_false_claims": rate, "max_certain_claims": rate / 4}
    with one_direction(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate_fit, "COPY", 2.0)
        fit = fit_gate(forget, calibration, space, digests=[], **rates)
        points, claimed, certain = space.points(forget), 0, 0
        for i in range(texts):
            without = fit_gate(forget[torch.arange(texts) != i], calibration, space, digests=[], **rates).gate
            score = float(best_cosines(points[i : i + 1], without.directions))
            assume(min(abs(score - without.threshold), abs(score - without.certain)) > 1e-5)
            claimed += score > without.threshold
            certain += score > without.certain
    assert (fit.unseen_claimed, fit.unseen_certain) == (claimed / texts, certain / texts)
    assert fit.unseen_rows == texts


def test_copies_of_a_text_prove_no_gap() -> None:
    """Four quotations of one text: a gate as of one text, and nothing said of unseen ones."""
    forget, others, space = _subjects(1, 1)
    quoted = forget + 0.01 * torch.randn(4, forget.shape[1], generator=torch.Generator().manual_seed(2))
    rates = {"max_false_claims": 0.01, "max_certain_claims": 0.008}
    fit = fit_gate(quoted, others, space, digests=[], **rates)
    scores = best_cosines(space.points(others), fit.gate.directions)
    assert fit.gate.threshold == tail_threshold(scores, 0.01)
    assert fit.gate.certain == tail_threshold(scores, 0.008)
    assert fit.unseen_claimed is fit.unseen_certain is None and fit.unseen_rows == 0


def test_a_single_text_says_nothing_of_unseen_ones() -> None:
    fit = fit_gate(FORGET[:1], CALIBRATION, _plane(), digests=[b"1" * 32], max_false_claims=0.5)
    assert fit.unseen_claimed is fit.unseen_certain is None
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
    assert fit.unseen_claimed is not None and single.unseen_claimed is not None
    assert fit.unseen_claimed > 0.9 > single.unseen_claimed
    torch.testing.assert_close(fit.gate.directions.norm(dim=1), torch.ones(len(fit.gate.directions)))
    again = fit_gate(forget, others, space, digests=[], max_false_claims=0.01)
    assert again.gate.digest == fit.gate.digest, "no chance in it"


def test_texts_on_one_subject_get_one_direction() -> None:
    forget, others, space = _subjects(1, 20)
    assert len(fit_gate(forget, others, space, digests=[], max_false_claims=0.01).gate.directions) == 1


def test_directions_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_fit, "MAX_DIRECTIONS", 3)
    forget, others, space = _subjects(16, 2)
    fit = fit_gate(forget, others, space, digests=[], max_false_claims=0.0)
    assert len(fit.gate.directions) == 3 < MAX_DIRECTIONS
    assert fit.own_recall < OWN_RECALL


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
