"""Isolation, as properties over random active sets: no request has a say in the answer to what it does not claim.

All comparisons of answers are of their probabilities, bit for bit.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tiny_models import FAMILIES, make_tiny_model
from torch import Tensor

from models import inference, packing
from models.errors import FingerprintMismatch, InvalidGate, TextTooLong
from models.gate import NEVER, Gate, cosines, fit_space
from models.inference import Classifier
from models.llm import FrozenLLM
from models.prefix_cache import Prefix
from models.routing import Digest, Route, Routed, Routes, classify_routed
from models.soft_prompt import SoftPrompt
from models.text_states import text_states

WORDS = ["the", "film", "is", "good", "bad", "movie", "great", "awful", "director", "acting", "plot", "story", "scene"]
TEXTS = [" ".join(WORDS[(i * 7 + j * (i + 1)) % len(WORDS)] for j in range(1 + 2 * i)) for i in range(10)]
ROWS = [" ".join(WORDS[(i * i + j * (2 * i + 1)) % len(WORDS)] for j in range(2 + i % 6)) for i in range(30)]
Spec = tuple[int, int, int, tuple[str, ...], int | None]  # of World.route
MANY = 99  # more prompts than any query is claimed by


def _load(factory: pytest.TempPathFactory, family: str = "llama") -> FrozenLLM:
    return FrozenLLM.load(str(make_tiny_model(factory.mktemp(family), family)), quantization="none", device="cpu")


class World:
    """A model, two gate spaces and states of TEXTS to place gates among."""

    def __init__(self, llm: FrozenLLM) -> None:
        self.llm = llm
        self.classifier = Classifier(llm)
        rows = text_states(llm, ROWS)
        self.spaces = [fit_space(part, 2, fingerprint=llm.fingerprint) for part in (rows[:20], rows[10:])]
        self.states = text_states(llm, TEXTS)
        # Of random prompts those that abstain on many texts, but not on all.
        candidates = [self._random_prompt(seed) for seed in range(40)]
        shares = [sum(a.abstained for a in self.classifier.classify(TEXTS, [p])) / len(TEXTS) for p in candidates]
        self._prompts = [candidates[i] for i in sorted(range(40), key=lambda i: abs(shares[i] - 0.6))[:8]]

    def _random_prompt(self, seed: int) -> SoftPrompt:
        generator = torch.Generator().manual_seed(seed)
        length = 2 + seed % 4
        return SoftPrompt(torch.randn(length, self.llm.hidden_size, generator=generator) * 0.5, self.llm.fingerprint)

    def prompt(self, seed: int) -> SoftPrompt:
        return self._prompts[seed % len(self._prompts)]

    def route(
        self, seed: int, claims: int, space: int = 0, known: Sequence[str] = (), certain: int | None = None
    ) -> Route:
        """A random direction, and a threshold that about ``claims`` of TEXTS pass, or one of them just does not.

        ``certain``: how many of those pass the higher threshold too; None: there is none.
        """
        found = self.spaces[space]
        generator = torch.Generator().manual_seed(seed + 1)
        direction = torch.nn.functional.normalize(torch.randn(len(found.center), generator=generator), dim=0)
        scores = cosines(found.points(self.states), direction.unsqueeze(0)).flatten().sort(descending=True).values
        ladder = [float(scores[0]) + 1e-3, *scores.tolist()]
        threshold = ladder[claims]
        if claims and seed % 2:  # not an order statistic but in between
            threshold = (ladder[claims] + ladder[claims - 1]) / 2
        digests = torch.tensor([list(_digest(t)) for t in known], dtype=torch.uint8).reshape(-1, 32)
        sure = NEVER if certain is None else max(threshold, ladder[min(certain, claims)])
        return Route(self.prompt(seed), Gate(direction.unsqueeze(0), threshold, sure, digests, found.digest))

    def routes(self, routes: Sequence[Route]) -> Routes:
        return Routes(routes, {s.digest: s for s in self.spaces}, fingerprint=self.llm.fingerprint)

    def ask(
        self, routes: Sequence[Route], texts: Sequence[str], *, digest: Digest | None = None, max_prompts: int = MANY
    ) -> list[Routed]:
        return classify_routed(
            self.classifier, self.routes(routes), texts, digest=digest, max_prompts=max_prompts, batch_size=4
        )

    def bare(self, texts: Sequence[str]) -> list[inference.Classification]:
        return Classifier(self.llm).classify(texts, batch_size=4)


def _digest(text: str) -> bytes:
    return hashlib.sha256(b"key" + text.encode()).digest()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(_load(tmp_path_factory))


@st.composite
def _specs(draw: st.DrawFn) -> Spec:
    known = draw(st.lists(st.sampled_from(TEXTS), max_size=2, unique=True))
    certain = draw(st.none() | st.integers(0, 3))
    return draw(st.integers(0, 400)), draw(st.integers(0, len(TEXTS))), draw(st.integers(0, 1)), tuple(known), certain


SETS = st.lists(_specs(), max_size=4, unique_by=lambda spec: spec[0])
QUERIES = st.lists(st.sampled_from([*TEXTS, *ROWS[:4]]), min_size=1, max_size=7)
thorough = settings(max_examples=60, deadline=None)


# --- the properties --------------------------------------------------------------------------------------------------


def test_the_random_worlds_hold_every_case(world: World) -> None:
    """Otherwise the properties below would say little."""
    routes = [world.route(seed, claims) for seed, claims in ((1, 3), (2, 5), (3, 2), (11, 7))]
    found = world.ask(routes, TEXTS)
    assert {min(len(r.claims), 2) for r in found} == {0, 1, 2}
    claimed = [r for r in found if r.claims]
    assert any(r.answer.abstained and not r.base.abstained for r in claimed)
    assert any(not r.answer.abstained for r in claimed)
    assert len({r.label for r in world.bare(TEXTS)}) > 1


@thorough
@given(specs=SETS, texts=QUERIES, max_prompts=st.integers(1, 4))
def test_what_no_gate_claims_is_answered_as_by_the_bare_model(
    world: World, specs: list[Spec], texts: list[str], max_prompts: int
) -> None:
    found = world.ask([world.route(*s) for s in specs], texts, digest=_digest, max_prompts=max_prompts)
    for routed, bare in zip(found, world.bare(texts), strict=True):
        assert routed.base == bare
        if not routed.claims and not routed.guarded:
            assert not routed.certain
            assert routed.answer == bare


@thorough
@given(specs=SETS, new=_specs(), texts=QUERIES, data=st.data())
def test_a_route_that_comes_or_goes_changes_no_answer_that_it_does_not_claim(
    world: World,
    specs: list[Spec],
    new: Spec,
    texts: list[str],
    data: st.DataObject,
) -> None:
    others = [world.route(*s) for s in specs]
    place = data.draw(st.integers(0, len(others)))
    route = world.route(*new)
    without = world.ask(others, texts, digest=_digest)
    together = world.ask([*others[:place], route, *others[place:]], texts, digest=_digest)
    for text, a, b in zip(texts, without, together, strict=True):
        kept = [i - (i > place) for i in b.claims if i != place]
        assert kept == list(a.claims), "the other gates claim what they claimed"
        if place not in b.claims and text not in new[3]:
            assert (a.answer, a.guarded, a.certain) == (b.answer, b.guarded, b.certain)


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("decides", ["guard", "certain", "both"])
def test_what_another_gate_decides_alone_leaves_the_batches_of_a_prompt_as_they_were(
    world: World, decides: str, packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last bits of an answer depend on its batch; so a query may not leave it on another request's word."""
    if packed:
        assert packing.packable(world.llm)
        # Packed rows depend on their batch by the kernel, which is another where they are large: here, with a long row.
        monkeypatch.setattr(packing, "MAX_SCORES", 10_000)
    else:
        monkeypatch.setattr(packing, "fits", lambda *_: False)
    everything = replace(world.route(0, 3).gate, threshold=-1.0)
    asked = [Route(world.prompt(seed), everything) for seed in range(8)]
    changed = 0
    for long in TEXTS[5:]:
        queries = [long, *TEXTS[:3]]
        direction = world.spaces[0].points(world.classifier.base_pass(queries, batch_size=4)[1])[0]
        known = [long] if decides != "certain" else []
        gate = replace(world.route(1, 0, known=known).gate, directions=direction.unsqueeze(0), threshold=0.999)
        if decides != "guard":
            gate = replace(gate, certain=0.999)
        for route in asked:
            before = world.ask([route], queries, digest=_digest)
            after = world.ask([route, Route(world.prompt(1), gate)], queries, digest=_digest)
            assert (after[0].answer.confidence, after[0].answer.abstained) == (1, True)
            assert [r.answer for r in after[1:]] == [r.answer for r in before[1:]]
            changed += [r.answer for r in world.ask([route], queries[1:])] != [r.answer for r in before[1:]]
    assert changed, "no answer depends on its batch, so nothing was shown"


@thorough
@given(
    specs=SETS, new=_specs(), text=st.sampled_from([*TEXTS, *ROWS[:4]]), max_prompts=st.integers(1, 3), data=st.data()
)
def test_asked_alone_the_cap_makes_no_difference_to_that(
    world: World,
    specs: list[Spec],
    new: Spec,
    text: str,
    max_prompts: int,
    data: st.DataObject,
) -> None:
    others, route = [world.route(*s) for s in specs], world.route(*new)
    place = data.draw(st.integers(0, len(others)))
    together = [*others[:place], route, *others[place:]]
    (a,) = world.ask(others, [text], digest=_digest, max_prompts=max_prompts)
    (b,) = world.ask(together, [text], digest=_digest, max_prompts=max_prompts)
    # Not by b.claims: a gate that the cap leaves no room may yet be certain.
    claims = world.routes([route]).margins(world.classifier.base_pass([text])[1])[0, 0] > 0
    if not claims and text not in new[3]:
        assert (a.answer, a.guarded, a.certain) == (b.answer, b.guarded, b.certain)
        assert list(a.claims) == [i - (i > place) for i in b.claims]


@thorough
@given(specs=SETS, texts=QUERIES)
def test_after_every_route_is_revoked_answers_are_the_bare_models(
    world: World, specs: list[Spec], texts: list[str]
) -> None:
    world.ask([world.route(*s) for s in specs], texts)
    found = world.ask([], texts, digest=_digest)
    bare = world.bare(texts)
    assert [r.answer for r in found] == bare
    assert [r.base for r in found] == bare
    assert all((r.claims, r.guarded, r.certain) == ((), False, False) for r in found)


@thorough
@given(specs=SETS, texts=QUERIES, max_prompts=st.integers(1, 4))
def test_claims_are_the_best_margins_and_no_more_than_the_cap(
    world: World, specs: list[Spec], texts: list[str], max_prompts: int
) -> None:
    routes = [world.route(*s) for s in specs]
    found = world.ask(routes, texts, max_prompts=max_prompts)
    states = world.classifier.base_pass(texts, batch_size=4)[1]
    for row, routed in enumerate(found):
        margins = {}
        for i, route in enumerate(routes):  # each gate by itself
            space = next(s for s in world.spaces if s.digest == route.gate.space)
            score = cosines(space.points(states), route.gate.directions)[row, 0]
            margins[i] = float(score) - route.gate.threshold
        wanted = sorted((i for i in margins if margins[i] > 0), key=lambda i: -margins[i])
        assert list(routed.claims) == wanted[:max_prompts]
        # Sure gates decide alone, also where the cap leaves no room for their prompt.
        sure = [i for i in wanted if margins[i] > routes[i].gate.certain - routes[i].gate.threshold]
        assert routed.certain == bool(sure)
        if sure:
            assert routed.answer.abstained and routed.answer.confidence == 1


@thorough
@given(specs=SETS, texts=QUERIES, max_prompts=st.integers(1, 4))
def test_it_abstains_exactly_when_a_prompt_that_was_asked_does(
    world: World, specs: list[Spec], texts: list[str], max_prompts: int
) -> None:
    routes = [world.route(*s[:4]) for s in specs]  # none that decides without its prompt
    found = world.ask(routes, texts, max_prompts=max_prompts)
    asked = {i: [row for row, routed in enumerate(found) if i in routed.claims] for i in range(len(routes))}
    answers = {
        (row, i): answer
        for i, rows in asked.items()
        for row, answer in zip(
            rows,
            Classifier(world.llm).classify([texts[row] for row in rows], [routes[i].prompt], batch_size=4),
            strict=True,
        )
    }
    for row, routed in enumerate(found):
        abstained = [answers[row, i] for i in routed.claims if answers[row, i].abstained]
        if abstained:
            assert routed.answer.abstained
            assert routed.answer.confidence == max(a.confidence for a in abstained)
            assert routed.answer in abstained
        else:
            assert routed.answer == routed.base


@thorough
@given(specs=SETS, texts=QUERIES, max_prompts=st.integers(1, 4))
def test_a_known_text_is_unknown_for_certain_and_changes_nothing_else(
    world: World, specs: list[Spec], texts: list[str], max_prompts: int
) -> None:
    routes = [world.route(*s) for s in specs]
    known = {text for spec in specs for text in spec[3]}
    known_here = known.intersection(texts)
    with_guard = world.ask(routes, texts, digest=_digest, max_prompts=max_prompts)
    without = world.ask(routes, texts, max_prompts=max_prompts)
    for text, a, b in zip(texts, with_guard, without, strict=True):
        assert (a.guarded, b.guarded) == (text in known, False)
        assert (a.base, a.claims, a.certain) == (b.base, b.claims, b.certain)
        if text in known:
            assert a.answer.label == "unknown" and a.answer.abstained and a.answer.confidence == 1
            assert list(a.answer.probabilities) == list(b.answer.probabilities)
            assert sum(a.answer.probabilities.values()) == 1
        elif not any(known_here.intersection(specs[i][3]) for i in a.claims):
            # Otherwise a prompt's own gate took a known text out of its batch, and last bits may differ.
            assert a.answer == b.answer


def test_the_guard_needs_no_claim(world: World) -> None:
    routes = [world.route(5, 0, known=TEXTS[:1])]
    found = world.ask(routes, TEXTS[:2], digest=_digest)
    assert [r.claims for r in found] == [(), ()]
    assert [r.guarded for r in found] == [True, False]
    assert [r.answer.label for r in found] == ["unknown", world.bare(TEXTS[:2])[1].label]
    assert world.routes(routes).known_by(_digest(TEXTS[0])) == [0]
    assert not world.routes(routes).known_by(_digest(TEXTS[1]))
    assert not world.ask(routes, TEXTS[:1])[0].answer.abstained


@thorough
@given(specs=SETS, texts=QUERIES, max_prompts=st.integers(1, 4), data=st.data())
def test_the_order_of_routes_does_not_matter(
    world: World,
    specs: list[Spec],
    texts: list[str],
    max_prompts: int,
    data: st.DataObject,
) -> None:
    routes = [world.route(*s) for s in specs]
    order = data.draw(st.permutations(range(len(routes))))
    one = world.ask(routes, texts, digest=_digest, max_prompts=max_prompts)
    two = world.ask([routes[i] for i in order], texts, digest=_digest, max_prompts=max_prompts)
    for a, b in zip(one, two, strict=True):
        assert (a.answer, a.base, a.guarded, a.certain) == (b.answer, b.base, b.guarded, b.certain)
        assert a.claims == tuple(order[i] for i in b.claims)


@thorough
@given(specs=SETS)
def test_two_spaces_side_by_side_claim_as_each_alone(world: World, specs: list[Spec]) -> None:
    routes = [world.route(*s) for s in specs]
    assume({spec[2] for spec in specs} == {0, 1})
    together = world.routes(routes)
    margins = together.margins(world.states)
    for side in (0, 1):
        members = [i for i, spec in enumerate(specs) if spec[2] == side]
        space = world.spaces[side]
        alone = Routes([routes[i] for i in members], {space.digest: space}, fingerprint=world.llm.fingerprint)
        assert torch.equal(margins[:, members], alone.margins(world.states))
        either_claims = together.claims(margins, MANY), alone.claims(margins[:, members], MANY)
        for a, b in zip(*either_claims, strict=True):
            assert [i for i in a if i in members] == [members[i] for i in b]


# --- every family, one set -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_isolation_in_every_family(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    world = World(_load(tmp_path_factory, family))
    weights, bare = world.llm.weights_digest(), world.bare(TEXTS)
    for seed in range(20):  # until some texts are claimed by none, one and several
        routes = [world.route(seed, 3), world.route(seed + 1, 4), world.route(seed + 2, 3)]
        found = world.ask(routes, TEXTS)
        if {min(len(r.claims), 2) for r in found} == {0, 1, 2}:
            break
    else:
        raise AssertionError("no such set among the random ones")
    assert [r.base for r in found] == bare
    assert all(r.answer == b for r, b in zip(found, bare, strict=True) if not r.claims)
    for gone in range(3):
        left = world.ask([r for i, r in enumerate(routes) if i != gone], TEXTS)
        assert all(a.answer == b.answer for a, b in zip(found, left, strict=True) if gone not in a.claims)
    assert [r.answer for r in world.ask([], TEXTS)] == bare
    assert world.llm.weights_digest() == weights


# --- what is refused -------------------------------------------------------------------------------------------------


def test_routes_of_another_model_or_without_their_space_are_refused(world: World) -> None:
    route, here, there = world.route(1, 3), world.llm.fingerprint, "b" * 64
    spaces = {s.digest: s for s in world.spaces}
    foreign_prompt = replace(route, prompt=SoftPrompt(route.prompt.embeddings, there))
    foreign_space = replace(world.spaces[0], fingerprint=there)
    with pytest.raises(FingerprintMismatch):
        Routes([route, foreign_prompt], spaces, fingerprint=here)
    with pytest.raises(FingerprintMismatch):
        Routes([route], {**spaces, foreign_space.digest: foreign_space}, fingerprint=here)
    with pytest.raises(FingerprintMismatch):
        Routes([route], spaces, fingerprint=there)
    with pytest.raises(InvalidGate, match="not there"):
        Routes([route], {world.spaces[1].digest: world.spaces[1]}, fingerprint=here)
    with pytest.raises(InvalidGate, match="not there"):
        world.routes([]).plus(route, world.spaces[1])
    narrow = replace(route, gate=replace(route.gate, directions=route.gate.directions[:, :-1]))
    for routes in ([narrow], [route, narrow], [narrow, route]):
        with pytest.raises(InvalidGate, match="width"):
            Routes(routes, spaces, fingerprint=here)


def test_plus_keeps_the_others_and_comes_last(world: World) -> None:
    routes = [world.route(seed, 4, seed % 2) for seed in (1, 2, 3)]
    grown = world.routes([])
    for route in routes:
        space = next(s for s in world.spaces if s.digest == route.gate.space)
        grown = grown.plus(route, space)
    assert grown.routes == tuple(routes)
    assert torch.equal(grown.margins(world.states), world.routes(routes).margins(world.states))


def test_no_text_and_too_long_a_text(world: World) -> None:
    routes = [world.route(1, 3)]
    assert world.ask(routes, [], digest=_digest) == []
    with pytest.raises(TextTooLong):
        world.ask(routes, ["bad", "good " * 600])


# --- the classifier behind it ----------------------------------------------------------------------------------------


def _answers(classifier: Classifier, prompts: Sequence[SoftPrompt]) -> list[Tensor]:
    return [classifier.hidden(TEXTS), *(classifier.hidden(TEXTS, [p]) for p in prompts)]


def _kept(classifier: Classifier) -> list[tuple[str, ...]]:
    return list(classifier._prefixes)


def test_prefixes_of_prompts_that_are_gone_are_let_go(world: World) -> None:
    one, two, three = (world.prompt(seed) for seed in (1, 2, 3))
    classifier = Classifier(world.llm)
    before = _answers(classifier, [one, two, three])
    classifier.hidden(TEXTS, [one, two])
    classifier.keep({one.digest, three.digest})
    assert _kept(classifier) == [(), (one.digest,), (three.digest,)]
    classifier.keep([])
    assert _kept(classifier) == [()], "the bare template is nobody's"
    assert all(torch.equal(a, b) for a, b in zip(_answers(classifier, [one, two, three]), before, strict=True))


@pytest.mark.parametrize("family", FAMILIES)
def test_beyond_the_byte_budget_the_oldest_prefix_goes_and_answers_stay(
    family: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(_load(tmp_path_factory, family))
    prompts = [world._random_prompt(4 * seed) for seed in (1, 2, 3)]  # of one length, so of one size
    keys = [(p.digest,) for p in prompts]
    classifier = Classifier(world.llm)
    before = _answers(classifier, prompts)
    assert _kept(classifier) == [(), *keys]
    size = classifier.prefix(prompts[:1])
    assert size is not None

    monkeypatch.setattr(classifier, "_prefix_bytes", 2 * size.nbytes)
    again = _answers(classifier, prompts)
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))
    assert _kept(classifier) == [(), *keys[1:]], "the bare template's stays: every batch needs it"
    classifier.prefix(prompts[1:2])
    classifier.prefix(prompts[:1])
    assert _kept(classifier) == [(), keys[1], keys[0]], "the one that was used last but one stays"

    monkeypatch.setattr(classifier, "_prefix_bytes", 0)
    again = _answers(classifier, prompts)
    assert _kept(classifier) == [(), keys[2]], "the one in use stays whatever its size"
    assert all(torch.equal(a, b) for a, b in zip(again, before, strict=True))


def test_routed_answers_survive_eviction(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    routes = [world.route(seed, 6) for seed in (1, 2, 3)]
    before = world.ask(routes, TEXTS)
    monkeypatch.setattr(world.classifier, "_prefix_bytes", 0)
    for _ in range(2):
        assert world.ask(routes, TEXTS) == before


def test_prompts_that_have_no_room_together_do_not_push_each_other_out_in_turn(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = replace(world.route(2, len(TEXTS)).gate, threshold=-2.0)  # claims whatever comes
    routes = [Route(world._random_prompt(4 * seed), gate) for seed in (1, 2, 3)]  # of one length, so of one size
    classifier, computed = Classifier(world.llm), []
    monkeypatch.setattr(world, "classifier", classifier)
    one = classifier.prefix([routes[0].prompt])
    assert one is not None
    monkeypatch.setattr(classifier, "_prefix_bytes", 2 * one.nbytes)
    before = world.ask(routes, TEXTS)
    assert [len(found.claims) for found in before] == [3] * len(TEXTS)
    compute = inference.compute_prefix

    def counted(llm: FrozenLLM, soft: torch.Tensor | None) -> Prefix | None:
        computed.append(soft)
        return compute(llm, soft)

    monkeypatch.setattr(inference, "compute_prefix", counted)
    for _ in range(3):
        assert world.ask(routes, TEXTS) == before
    assert len(computed) == 3 and None not in computed, "one of three each time, not all, and never the template's"
