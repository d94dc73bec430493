"""The figures behind a request's evidence: worked by hand, and what they must do whatever the numbers are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path

import pytest
import torch
from api_kit import gate_space, make_gate, soft_prompt, tiny_llm
from torch import Tensor

from app.evidence import Found
from models.evidence import Rows, Views, as_document, choose, held_out_figures, make_evidence, routed_views
from models.examples import Example
from models.gate import best_cosines
from models.inference import Classifier
from models.metrics import auc, auc_interval, roc
from models.routing import Route, Routes, classify_routed
from models.text_states import text_states
from models.tsne import affinities, divergence, tsne

# --- the ROC curve ---------------------------------------------------------------------------------------------------


def test_a_curve_by_hand() -> None:
    """Members .9 .5 .5 .1, others .7 .5 .2: of 12 pairs the member is higher in 3 + 1 + 1 + 0, equal in 0 + 1 + 1."""
    members, others = torch.tensor([0.9, 0.5, 0.5, 0.1]), torch.tensor([0.7, 0.5, 0.2])
    assert auc(members, others) == pytest.approx((5 + 2 / 2) / 12)
    third = 1 / 3
    assert roc(members, others) == [(0, 0), (0, 0.25), (third, 0.25), (2 * third, 0.75), (1, 0.75), (1, 1)]


@pytest.mark.parametrize("seed", range(5))
def test_the_area_under_the_curve_is_the_auc(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    members = torch.randint(0, 9, (13,), generator=draw) / 8  # many are equal
    others = torch.randint(0, 9, (7,), generator=draw) / 8
    curve = roc(members, others)
    area = sum((b[0] - a[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))
    assert area == pytest.approx(auc(members, others))
    assert curve[0] == (0, 0) and curve[-1] == (1, 1) and curve == sorted(curve)


def test_the_interval_of_an_area_by_hand() -> None:
    """At the end A = 1 the lower bound solves 1 − t = z √V(t), at A = 0.5 both ends stand equally far from it.

    One member and one other: V(t) = t (1 − t), so (1 − t) = z² t and t = 1 / (1 + z²) = 1 / 4.841459.
    """
    assert auc_interval(1.0, 1, 1) == pytest.approx((0.206549, 1.0), abs=1e-6)
    assert auc_interval(0.0, 1, 1) == pytest.approx((0.0, 0.793451), abs=1e-6)
    low, high = auc_interval(0.5, 30, 50)
    assert 0.5 - low == pytest.approx(high - 0.5)
    # V(high), with rows (30 + 50) / 2 − 1 = 39, over 1500 pairs.
    spread = (1 - high) / (2 - high) + high / (1 + high)
    variance = high * (1 - high) * (1 + 39 * spread) / 1500
    assert high - 0.5 == pytest.approx(1.959964 * math.sqrt(variance), abs=1e-9)


def test_the_interval_holds_the_area_and_narrows() -> None:
    for area in (0.0, 0.02, 0.5, 0.9, 1.0):
        bounds = [auc_interval(area, rows, 2 * rows) for rows in (1, 5, 40, 500)]
        assert all(0 <= low <= area <= high <= 1 for low, high in bounds)
        widths = [high - low for low, high in bounds]
        assert widths == sorted(widths, reverse=True) and widths[-1] > 0
    for bad in ((0.5, 0, 1), (0.5, 1, 0), (1.1, 2, 2), (float("nan"), 2, 2)):
        with pytest.raises(ValueError, match="not an area"):
            auc_interval(*bad)


# --- the picture -----------------------------------------------------------------------------------------------------


def clusters(rows: int, width: int, apart: float) -> Tensor:
    states = torch.randn(2 * rows, width, generator=torch.Generator().manual_seed(1))
    states[rows:] += apart
    return states


def test_two_far_clusters_stay_apart_the_same_way_every_time() -> None:
    states = clusters(20, 16, 5.0)
    plane = tsne(states, seed=3)
    assert plane.shape == (40, 2) and torch.equal(plane, tsne(states, seed=3))
    assert not torch.equal(plane, tsne(states, seed=4))
    distances = torch.cdist(plane, plane)
    own = torch.block_diag(torch.ones(20, 20), torch.ones(20, 20)).bool()
    nearest = distances.fill_diagonal_(torch.inf).argmin(1)
    assert bool(own[torch.arange(40), nearest].all()), "the nearest point is of the same cluster"
    first, second = plane[:20], plane[20:]
    between = (first.mean(0) - second.mean(0)).norm()
    assert between > 2 * max((part - part.mean(0)).norm(dim=1).max() for part in (first, second))


def test_it_is_as_good_as_the_known_library() -> None:
    """``tsne_reference.json``: what scikit-learn made of these states, which it says itself how."""
    theirs = json.loads((Path(__file__).parent / "tsne_reference.json").read_text())
    states = clusters(40, 8, 2.0)
    attraction = affinities(states.double(), 79 / 3)
    ours = divergence(tsne(states, seed=0), attraction)
    placed = torch.tensor(theirs["placed"]).double()
    assert theirs["kl_divergence"] == pytest.approx(divergence(placed, attraction), rel=1e-3)  # the same affinities
    assert ours < 1.05 * divergence(placed, attraction)


def test_affinities_are_as_wide_as_asked() -> None:
    """Of points at the corners of a square each side pulls alike, and a diagonal less."""
    square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 0.0]]).double()
    found = affinities(square, 2.5)
    assert float(found.sum()) == pytest.approx(1.0)
    assert found[0, 1] == pytest.approx(float(found[0, 3])) and found[0, 1] > found[0, 2] > 0
    shares = 4 * found[0]  # symmetric here, so these are the conditional ones
    entropy = -sum(float(s) * math.log(float(s)) for s in shares[1:])
    assert math.exp(entropy) == pytest.approx(2.5, rel=1e-6)


def test_points_that_are_hard_to_place() -> None:
    assert tsne(torch.zeros(0, 4), seed=0).shape == (0, 2)
    assert torch.equal(tsne(torch.ones(2, 4), seed=0), torch.zeros(2, 2, dtype=torch.float64))
    for states in (torch.ones(9, 4), torch.arange(9.0).unsqueeze(1), 1e6 * clusters(5, 3, 1.0)):
        assert bool(torch.isfinite(tsne(states, seed=0)).all())
    with pytest.raises(ValueError, match="not finite"):
        tsne(torch.tensor([[1.0], [float("nan")]]), seed=0)


# --- what is served ---------------------------------------------------------------------------------------------------


def test_the_served_view_is_what_the_service_answers() -> None:
    """With a gate that claims some texts and is certain of one, and a prompt that abstains on some of them."""
    classifier, space = Classifier(tiny_llm()), gate_space()
    texts = [f"{word} {noun} number {i}" for i, (word, noun) in enumerate(product(("good", "awful"), "abcdef"))]
    asked = [*texts, "a good film", "the plot is bad"]
    gate = make_gate(*texts)
    scores = best_cosines(space.points(text_states(tiny_llm(), texts)), gate.directions)
    gate = replace(gate, threshold=float(scores.median()), certain=float(scores.topk(2).values.mean()))
    mixed = 0
    for seed in range(40):
        route = Route(soft_prompt(seed), gate)
        routes = Routes([route], {space.digest: space}, fingerprint=tiny_llm().fingerprint)
        answers = classify_routed(classifier, routes, asked, digest=None, max_prompts=4)
        asked_prompt = [one for one in answers if one.claims and not one.certain]
        if len({one.answer.abstained for one in asked_prompt}) < 2:
            continue
        mixed += 1
        seen = routed_views(classifier, routes, asked)
        assert seen.moved.tolist() == [bool(one.claims) for one in answers] and sum(one.certain for one in answers) == 1
        for scores, found in (
            (seen.base_scores, [one.base for one in answers]),
            (seen.served_scores, [one.answer for one in answers]),
        ):
            torch.testing.assert_close(scores, torch.tensor([list(one.probabilities.values()) for one in found]))
        assert torch.equal(seen.base[~seen.moved], seen.served[~seen.moved])
        assert not bool((seen.base == seen.served).all(1)[seen.moved].any())
        if mixed == 2:
            return
    raise AssertionError("no prompt abstains on some and not on others")


# --- which rows ------------------------------------------------------------------------------------------------------


def rows(count: int, *labels: str | None) -> list[Example]:
    return [Example(f"text {labels} {i}", labels[i % len(labels)]) for i in range(count)]


def test_others_have_the_labels_of_the_forget_texts() -> None:
    forget = rows(4, "positive", "positive", "positive", "negative")
    found = choose(forget, rows(60, "positive", "negative"), None, count=20, seed=0)
    assert found.forget == forget and found.others is None
    assert sorted(e.label or "" for e in found.retain) == ["negative"] * 5 + ["positive"] * 15
    held = choose(forget, rows(60, "positive", "negative"), rows(3, "positive"), count=20, seed=0)
    assert held.retain == found.retain and held.others is not None and len(held.others) == 3
    assert len(choose(rows(50, "positive"), forget, None, count=20, seed=0).forget) == 20
    assert len(choose(rows(2, None), rows(60, "positive"), None, count=20, seed=0).retain) == 20
    assert [e.label for e in choose(rows(2, "negative"), rows(3, "positive"), None, count=9, seed=0).retain]


def views(rows: Rows, base: list[float], served: list[float], moved: list[bool]) -> Views:
    """Scores of two labels and ``unknown``: the given ones are those of the first label."""

    def scores(first: list[float]) -> Tensor:
        return torch.tensor([[one, (1 - one) / 2, (1 - one) / 2] for one in first])

    states = torch.randn(len(base), 8, generator=torch.Generator().manual_seed(0))
    after = torch.where(torch.tensor(moved).unsqueeze(1), states + 9, states)
    return Views(states, after, scores(base), scores(served), torch.tensor(moved))


def test_evidence_by_hand() -> None:
    """Two forget texts of the first label, then three retain texts of it, of which one is claimed with them."""
    found = Rows(rows(2, "first"), rows(3, "first"), None)
    seen = views(found, [0.9, 0.6, 0.8, 0.5, 0.4], [0.1, 0.1, 0.8, 0.1, 0.4], [True, True, False, True, False])
    made = make_evidence(found, seen, ["first", "second"], seed=0)
    assert (made.members, made.others, made.held_out, made.labelled, made.moved) == (2, 3, False, True, 3)
    assert made.base.auc == pytest.approx(5 / 6)  # .9 above all three, .6 above two
    assert made.served.auc == pytest.approx(1 / 6)  # .1 and .1 each equal to one of three
    assert (made.base.low, made.base.high) == auc_interval(made.base.auc, 2, 3)
    forget, retain = made.clusters
    assert (forget.set, forget.label, len(forget.base)) == ("forget", "first", 2)
    assert all(a != b for a, b in zip(forget.base, forget.served, strict=True))
    assert sum(a == b for a, b in zip(retain.base, retain.served, strict=True)) == 2
    document = as_document(made)
    assert document["membership"]["non_members"] == "retain" and document["membership"]["score"] == "true label"
    assert document["membership"]["served"]["roc"] == [[0, 0], [0.3333, 0], [0.6667, 0], [1, 1]]


def test_texts_without_a_label_are_scored_by_the_models_own_answer() -> None:
    """And are shown without one: the model's answer on a forgotten text is not for everyone who may see evidence."""
    found = Rows(rows(2, None), rows(2, "first"), rows(2, "second", "first"))
    seen = views(found, [0.1, 0.9, 0.5, 0.5, 0.3, 0.7], [0.1] * 6, [False] * 6)
    made = make_evidence(found, seen, ["first", "second"], seed=0)
    assert not made.labelled and made.held_out and made.others == 2 and made.moved == 0
    # Their answers have .45 and .9, the others' .35 and .7.
    assert made.base.auc == pytest.approx(3 / 4)
    assert [(one.set, one.label) for one in made.clusters] == [("forget", None), ("retain", "first")]
    assert all(one.base == one.served for one in made.clusters)


def test_right_answers_on_held_out_rows_by_hand() -> None:
    """Of three held-out rows the base model has two right; of these the request takes one for its own."""
    found = Rows(rows(1, "first"), rows(1, "first"), [*rows(2, "first"), *rows(1, "second"), *rows(1, None)])
    base = [0.9, 0.9, 0.9, 0.8, 0.7, 0.2]  # of the first label; where it has .2 the two others have .4 each
    seen = views(found, base, [0.1, 0.9, 0.9, 0.0, 0.7, 0.2], [True] + [False] * 5)
    unknown = seen.served_scores.clone()
    unknown[3] = torch.tensor([0.0, 0.0, 1.0])
    seen = replace(seen, served_scores=unknown)
    assert held_out_figures(found, seen, ["first", "second"]) == {
        "held_out_rows": 4,
        "held_out_accuracy_before": 0.75,  # the row without a label counts the base model's answer as right
        "held_out_accuracy": 0.5,
    }
    assert held_out_figures(Rows(found.forget, found.retain, None), seen, ["first", "second"]) == {}
    assert Found(None, "ValueError").figures == {"membership": None}
