"""Checks of a whole active set: figures worked by hand on a set of twelve texts, every limit, pushed-out canaries."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_model

from models.errors import DatasetError, TextTooLong
from models.evaluation import CheckLimits
from models.examples import Example
from models.gate import NEVER, Gate, cosines, fit_space
from models.gate_fit import GateFit, mean_direction
from models.inference import Classifier
from models.llm import FrozenLLM
from models.routed_checks import RoutedLimits, RoutedReport, check_routes, lost_canaries
from models.routing import Route, Routes
from models.soft_prompt import SoftPrompt
from models.text_states import text_states

WORDS = ["the", "film", "is", "good", "bad", "movie", "great", "awful", "director", "acting", "plot", "story", "scene"]
TEXTS = [" ".join(WORDS[(i * 7 + j * (i + 1)) % len(WORDS)] for j in range(2 + i)) for i in range(12)]
ROWS = [" ".join(WORDS[(i * i + j * (2 * i + 1)) % len(WORDS)] for j in range(2 + i % 6)) for i in range(30)]
FORGET, CALIBRATION = TEXTS[:2], TEXTS[2:]
OTHER = {"positive": "negative", "negative": "positive"}


class World:
    """FORGET and CALIBRATION, a prompt that always abstains and one that never does, and gates on chosen texts."""

    def __init__(self, llm: FrozenLLM) -> None:
        self.llm, self.classifier = llm, Classifier(llm)
        self.space = fit_space(text_states(llm, ROWS), 2, fingerprint=llm.fingerprint)
        self.states = text_states(llm, TEXTS)
        self.points = self.space.points(self.states)
        self.base = [answer.label for answer in self.classifier.classify(TEXTS)]
        self.always, self.never = self._prompt(len(TEXTS)), self._prompt(0)
        # The base model is right on all retain rows but the last.
        right = self.base[2:]
        self.rows = [Example(text, label) for text, label in zip(CALIBRATION, right, strict=True)]
        self.rows[-1] = Example(CALIBRATION[-1], OTHER[right[-1]])

    def _prompt(self, abstains: int) -> SoftPrompt:
        for seed in range(300):
            generator = torch.Generator().manual_seed(seed)
            embeddings = torch.randn(3, self.llm.hidden_size, generator=generator) * 0.5
            prompt = SoftPrompt(embeddings, self.llm.fingerprint)
            if sum(a.abstained for a in self.classifier.classify(TEXTS, [prompt])) == abstains:
                return prompt
        raise AssertionError(f"no random prompt abstains on {abstains} texts")

    def gate(self, *claimed: int) -> Gate:
        """Claims exactly these of TEXTS."""
        direction = mean_direction(self.points[list(claimed)])
        scores = cosines(self.points, direction.unsqueeze(0)).flatten()
        inside = scores[list(claimed)].min()
        outside = torch.cat([scores[[i for i in range(len(TEXTS)) if i not in claimed]], torch.tensor([-1.0])]).max()
        assert inside > outside + 1e-3, "these texts cannot be told from the others"
        digests = torch.zeros(0, 32, dtype=torch.uint8)
        return Gate(direction.unsqueeze(0), float(inside + outside) / 2, NEVER, digests, self.space.digest)

    def routes(self, *routes: Route) -> Routes:
        return Routes(routes, {self.space.digest: self.space}, fingerprint=self.llm.fingerprint)

    def check(
        self,
        route: Route,
        others: Sequence[Route] = (),
        *,
        rows: Sequence[Example] | None = None,
        limits: CheckLimits | None = None,
        max_total_claims: float = 1.0,
        max_prompts: int = 4,
        max_retain_rows: int = 100,
        unseen: float | None = 0.5,
    ) -> RoutedReport:
        fit = GateFit(route.gate, 0.75, unseen, None if unseen is None else 0.25, 0 if unseen is None else 4)
        return check_routes(
            self.classifier,
            self.routes(*others),
            self.routes(*others, route),
            fit,
            [Example(text) for text in FORGET],
            self.rows if rows is None else rows,
            self.states[2:],
            max_retain_rows=max_retain_rows,
            seed=0,
            limits=RoutedLimits(limits or CheckLimits(0.0, 1.0, 1.0), max_total_claims, max_prompts),
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = make_tiny_model(tmp_path_factory.mktemp("m"))
    world = World(FrozenLLM.load(str(path), quantization="none", device="cpu"))
    assert set(world.base) == {"positive", "negative"}, "the figures below suppose that the bare model never abstains"
    return world


def _label(world: World, row: int) -> str:
    label = world.rows[row].label
    assert label is not None
    return label


def test_figures_by_hand(world: World) -> None:
    """One of two forget texts and the first of ten retain rows are claimed, and the prompt abstains on both."""
    report = world.check(Route(world.always, world.gate(0, 2)))
    assert (report.forget_abstain, report.forget_abstain_before) == (0.5, 0.0)
    assert (report.gate_recall, report.unseen_claimed, report.unseen_certain) == (0.75, 0.5, 0.25), "as the fit says"
    assert report.unseen_rows == 4
    assert report.prompt_abstain == 1.0, "whatever the gate claims"
    assert (report.false_claim_rate, report.false_abstain_rate, report.total_claim_rate) == (0.1, 0.1, 0.1)
    assert (report.check_rows, report.retain_rows) == (10, 10)
    assert report.retain_accuracy_before == pytest.approx(0.9)
    assert report.retain_accuracy == pytest.approx(0.8)
    for label, found in report.per_class.items():
        rows = [i for i in range(10) if _label(world, i) == label]
        assert found["rows"] == len(rows)
        assert found["before"] == pytest.approx(sum(i != 9 for i in rows) / len(rows))
        assert found["after"] == pytest.approx(sum(i not in {0, 9} for i in rows) / len(rows))
    assert sum(found["rows"] for found in report.per_class.values()) == 10
    assert (report.lost_canaries, report.active_requests) == (0, 1)
    assert report.passed and report.violations == []
    assert report.as_dict()["per_class"] == report.per_class


def test_a_claim_is_not_yet_an_abstention(world: World) -> None:
    report = world.check(Route(world.never, world.gate(0, 2)))
    assert (report.forget_abstain, report.false_claim_rate, report.false_abstain_rate) == (0, 0.1, 0)
    assert report.retain_accuracy == report.retain_accuracy_before == pytest.approx(0.9)


def test_a_gate_that_decides_alone_needs_no_prompt(world: World) -> None:
    gate = world.gate(0, 2)
    report = world.check(Route(world.never, replace(gate, certain=gate.threshold)))
    assert (report.forget_abstain, report.false_claim_rate, report.false_abstain_rate) == (0.5, 0.1, 0.1)
    assert report.retain_accuracy == pytest.approx(0.8)


def test_the_guard_is_left_out(world: World) -> None:
    digests = torch.tensor([list(hashlib.sha256(text.encode()).digest()) for text in FORGET], dtype=torch.uint8)
    report = world.check(Route(world.always, replace(world.gate(0, 2), digests=digests)))
    assert report.forget_abstain == 0.5


def test_others_count_in_the_totals_and_not_in_this_ones_rates(world: World) -> None:
    others = [Route(world.always, world.gate(1, 3)), Route(world.never, world.gate(4))]
    report = world.check(Route(world.always, world.gate(0, 2)), others)
    assert report.total_claim_rate == 0.3
    assert (report.false_claim_rate, report.false_abstain_rate) == (0.1, 0.1)
    assert report.forget_abstain == 0.5, "what only the other one forgets comes back when that one is revoked"
    assert report.retain_accuracy == pytest.approx(0.7)
    assert report.active_requests == 3


def test_a_request_that_passes_only_through_anothers_prompt_fails(world: World) -> None:
    others = [Route(world.always, world.gate(0, 2))]
    report = world.check(Route(world.never, world.gate(0, 2)), others, limits=CheckLimits(0.5, 1.0, 1.0))
    assert report.forget_abstain == 0
    assert report.violations[0] == "forget abstain rate 0.0000 is below 0.5"
    assert world.check(Route(world.always, world.gate(0, 2)), others, limits=CheckLimits(0.5, 1.0, 1.0)).passed


def test_a_request_that_would_pass_alone_counts_as_it_is_served(world: World) -> None:
    """The other prompt has the larger margin, and of two claims only the first is asked."""
    own = Route(world.always, world.gate(0, 2))
    other = Route(world.never, replace(own.gate, threshold=own.gate.threshold - 0.01))
    assert world.check(own, [other], max_prompts=1).forget_abstain == 0
    assert world.check(own, [other], max_prompts=2).forget_abstain == 0.5
    assert world.check(own, max_prompts=1).forget_abstain == 0.5


def test_unlabelled_rows_count_the_bare_models_answer(world: World) -> None:
    unlabelled = [Example(text) for text in CALIBRATION]
    report = world.check(Route(world.always, world.gate(0, 2)), rows=unlabelled)
    assert (report.retain_accuracy_before, report.retain_accuracy) == (1.0, 0.9)


def test_a_sample_is_weighed_back(world: World) -> None:
    """Of one row per class, each stands for its class; the rates are of all rows all the same."""
    report = world.check(Route(world.always, world.gate(0, 2)), max_retain_rows=2)
    assert report.retain_rows == 2
    assert (report.check_rows, report.false_claim_rate) == (10, 0.1)
    sizes = {label: sum(e.label == label for e in world.rows) for label in report.per_class}
    assert report.retain_accuracy == pytest.approx(
        sum(found["after"] * sizes[label] for label, found in report.per_class.items()) / 10
    )


@pytest.mark.parametrize(
    ("limits", "options", "violation"),
    [
        (
            CheckLimits(0.5, 0.1, 0.0),
            {"max_total_claims": 0.1},
            None,
        ),  # to the last row; 0.1 is above itself in float32
        (CheckLimits(0.51, 0.1, 0.0), {}, "forget abstain rate 0.5000 is below 0.51"),
        (CheckLimits(0.5, 0.09, 0.0), {}, "retain accuracy fell by 0.1000, more than 0.09"),
        (CheckLimits(0.5, 0.1, 0.0), {"max_total_claims": 0.01}, None),  # one row is no evidence
    ],
)
def test_every_limit(world: World, limits: CheckLimits, options: dict[str, Any], violation: str | None) -> None:
    report = world.check(Route(world.always, world.gate(0, 2)), limits=limits, **options)
    if violation is None:
        assert report.violations == []
    else:
        assert len(report.violations) == 1 and violation in report.violations[0]
    assert report.passed == (violation is None)


def test_a_class_that_falls_too_far(world: World) -> None:
    """Every row of one class is claimed: its accuracy falls to nothing, and the other's stays."""
    everything = Route(world.always, replace(world.gate(0, 2), threshold=-1.0))
    report = world.check(everything, limits=CheckLimits(0.0, 1.0, 0.5))
    assert report.retain_accuracy == 0
    assert report.false_claim_rate == report.false_abstain_rate == report.total_claim_rate == 1
    assert not report.passed
    assert all(v.startswith("accuracy of class") for v in report.violations)
    assert world.check(everything, limits=CheckLimits(0.0, 1.0, 1.0)).passed


def test_total_claims_at_the_cap_are_no_violation_whatever_the_fraction(world: World) -> None:
    for claimed in range(1, 5):
        others = [Route(world.never, world.gate(row)) for row in range(3, 2 + claimed)]
        report = world.check(Route(world.never, world.gate(2)), others, max_total_claims=claimed / 10)
        assert report.total_claim_rate == claimed / 10
        assert report.passed, report.violations


def test_what_earlier_requests_used_up_is_the_sets(world: World) -> None:
    """A full set takes no more, also where the new request adds nothing on these rows: on others it will."""
    others = [Route(world.never, world.gate(row)) for row in (3, 4)]
    for claimed in ((0,), (3,), (5,)):
        report = world.check(Route(world.always, world.gate(*claimed)), others, max_total_claims=0.1)
        assert report.missed == ["set"] and "more than 0.1" in report.violations[0]
    disturbing = [Route(world.always, world.gate(row)) for row in (2, 3)]
    limits = CheckLimits(0.0, 0.1, 1.0)
    assert world.check(Route(world.always, world.gate(0)), disturbing, limits=limits).missed == ["set"]
    assert world.check(Route(world.always, world.gate(4)), disturbing, limits=limits).missed == ["set"]
    assert world.check(Route(world.always, world.gate(4)), disturbing[:1], limits=limits).missed == ["retain"]
    certain = replace(world.gate(4), certain=world.gate(4).threshold)
    assert world.check(Route(world.always, certain), disturbing[:1], limits=limits).missed == ["set"]


def test_a_prompt_that_learned_nothing_is_warned_of_whatever_its_gate_decides(world: World) -> None:
    gate, limits = world.gate(0, 1), CheckLimits(0.9, 1.0, 1.0)
    report = world.check(Route(world.never, replace(gate, certain=gate.threshold)), limits=limits)
    assert (report.forget_abstain, report.prompt_abstain) == (1.0, 0.0)
    assert report.passed and report.violations == report.missed == []
    assert report.warnings == ["the prompt's own forget abstain rate 0.0000 is below 0.9"]
    report = world.check(Route(world.never, gate), limits=limits)
    assert not report.passed and report.missed == ["forget"] and len(report.violations) == len(report.warnings) == 1
    assert world.check(Route(world.always, gate), limits=limits).warnings == []


def test_a_request_that_reaches_few_other_texts_is_warned_of(world: World) -> None:
    route = Route(world.always, world.gate(0, 1))
    for unseen, said in ((None, "too few different texts"), (0.44, "only 44% are likely to be found"), (0.5, None)):
        report = world.check(route, unseen=unseen)
        assert report.passed
        assert [warning for warning in report.warnings if said is not None and said in warning] == report.warnings
        assert len(report.warnings) == (said is not None)


def test_empty_sides_and_long_texts_are_refused(world: World) -> None:
    route = Route(world.always, world.gate(0, 2))
    with pytest.raises(DatasetError):
        world.check(route, rows=[])
    with pytest.raises(TextTooLong):
        world.check(route, rows=[Example("good " * 600, "positive"), *world.rows[1:]])
    fit = GateFit(route.gate, 0, None, None, 0)
    with pytest.raises(DatasetError):
        check_routes(
            world.classifier,
            world.routes(),
            world.routes(route),
            fit,
            [],
            world.rows,
            world.states[2:],
            max_retain_rows=10,
            seed=0,
            limits=RoutedLimits(CheckLimits(0, 1, 1), 1, 4),
        )


# --- neighbours and size ---------------------------------------------------------------------------------------------


def test_neighbours_are_the_rows_that_the_gate_would_claim_first(world: World) -> None:
    gate = world.gate(0, 2)
    order = cosines(world.points[2:], gate.directions).flatten().argsort(descending=True).tolist()
    assert order[0] == 0, "the one row that it claims"
    right = 1 + (order[1] != 9)  # the base model is wrong on the last row
    report = world.check(Route(world.always, gate))
    assert report.neighbour_rows == 2, "a quarter of ten"
    assert (report.neighbour_accuracy_before, report.neighbour_accuracy) == (right / 2, (right - 1) / 2)
    assert report.neighbour_abstain == 0.5
    report = world.check(Route(world.never, gate))
    assert report.neighbour_accuracy == report.neighbour_accuracy_before == right / 2
    assert report.neighbour_abstain == 0


def test_a_request_that_silences_what_is_beside_it_fails(world: World) -> None:
    gate = replace(world.gate(0, 2), threshold=-1.0)
    route, limits = Route(world.always, gate), CheckLimits(0.0, 1.0, 1.0, max_neighbour_drop=0.6)
    report = world.check(route, limits=limits)
    assert report.neighbour_accuracy == 0 and report.neighbour_accuracy_before > 0.6
    assert not report.passed and report.missed == ["retain"] and "nearest to the forget texts" in report.violations[0]
    certain = Route(world.never, replace(gate, certain=-1.0))
    assert world.check(certain, limits=limits).missed == ["set"], "no other prompt mends what a gate is certain of"
    one = Route(world.always, world.gate(0, 2))
    limits = CheckLimits(0.0, 1.0, 1.0, max_neighbour_drop=0.1)
    assert world.check(one, limits=limits).passed, "one of two rows is no evidence"


def test_a_prompt_out_of_all_proportion_fails(world: World) -> None:
    route = Route(world.always, world.gate(0, 2))
    lengths = route.prompt.embeddings.norm(dim=1) / world.llm.embed.weight.norm(dim=1).mean()
    report = world.check(route)
    assert report.prompt_norm == pytest.approx(float(lengths.max()))
    assert report.prompt_norm_mean == pytest.approx(float(lengths.mean()))
    within = CheckLimits(0.0, 1.0, 1.0, max_prompt_norm=report.prompt_norm)
    assert world.check(route, limits=within).passed
    report = world.check(route, limits=replace(within, max_prompt_norm=report.prompt_norm * 0.99))
    assert report.missed == ["norm"] and "times as long as a word" in report.violations[0]


# --- canaries --------------------------------------------------------------------------------------------------------


def test_a_larger_margin_pushes_an_earlier_request_out_of_the_cap(world: World) -> None:
    earlier = Route(world.always, world.gate(0))
    eager = Route(world.never, replace(earlier.gate, threshold=earlier.gate.threshold - 0.01))
    modest = Route(world.never, replace(earlier.gate, threshold=earlier.gate.threshold + 0.01))
    before = world.routes(earlier)
    assert lost_canaries(before, world.routes(earlier, eager), 1) == 1
    assert lost_canaries(before, world.routes(earlier, eager), 2) == 0
    assert lost_canaries(before, world.routes(earlier, modest), 1) == 0
    assert lost_canaries(before, before, 1) == 0
    assert lost_canaries(world.routes(), before, 1) == 0
    # What the new gate decides alone is answered `unknown` without any prompt.
    alone = replace(eager, gate=replace(eager.gate, certain=eager.gate.threshold))
    assert lost_canaries(before, world.routes(earlier, alone), 1) == 0

    report = world.check(eager, [earlier], max_prompts=1)
    assert report.lost_canaries == 1
    assert not report.passed
    assert len(report.violations) == 1 and report.violations[0].startswith("1 earlier requests")
    assert report.forget_abstain == 0, "and so it would be served"
    assert world.check(eager, [earlier], max_prompts=2).passed


def test_a_request_is_lost_once_and_only_if_it_was_reached(world: World) -> None:
    two = Route(world.always, world.gate(1))
    both = torch.cat([world.gate(0).directions, two.gate.directions])
    one = Route(world.always, replace(two.gate, directions=both))
    eager = Route(world.never, replace(one.gate, threshold=-1.0))
    assert lost_canaries(world.routes(one), world.routes(one, eager), 1) == 1, "both of its directions, one request"
    assert lost_canaries(world.routes(one, two), world.routes(one, two, eager), 2) == 1
    deaf = Route(world.always, replace(two.gate, threshold=1.5))  # a cosine with itself may round to above 1
    assert lost_canaries(world.routes(deaf), world.routes(deaf, eager), 1) == 0, "never reached, so not lost"
