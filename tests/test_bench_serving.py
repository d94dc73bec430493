"""Figures of ``bench.serving`` by hand; the engine's ways on a tiny model: all of them answer, and the same."""

from __future__ import annotations

import pytest
from tiny_models import make_tiny_model

from bench import engine
from bench.clients import Sample
from bench.routing_cost import interleaved
from bench.serving import median_ratio, rate, swap_figures
from models.llm import FrozenLLM

TEXTS = [f"the {word} is {how} good" for word in ("film", "plot", "story", "movie") for how in ("very", "quite", "not")]


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLLM:
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "llama")
    return FrozenLLM.load(str(model), quantization="none", device="cpu")


def answered(start: float, end: float) -> Sample:
    return Sample(start, end, 0, 200)


def test_a_rate_by_hand() -> None:
    first = [answered(0.0, 1.0), answered(0.0, 1.1), answered(0.0, 1.2)]  # one batch, waited for from the start
    second = [answered(1.0, 2.2), answered(1.1, 2.2), answered(1.2, 2.2)]
    third = [answered(2.2, 3.2), answered(2.2, 3.2), answered(2.2, 3.2)]
    # Six answers from 1.2 to 3.2; those after the last question say nothing of a full house.
    assert rate([*first, *second, *third, answered(3.2, 4.0)]) == pytest.approx(6 / 2.0)
    # A refusal is no answer.
    assert rate([*first, Sample(1.2, 1.3, 0, 503, 1.0), *second, *third, answered(3.2, 4.0)]) == pytest.approx(3.0)
    for few in (first, [*first, answered(1.2, 2.0)], [Sample(0.0, 0.1, 0, 503, 1.0)]):
        with pytest.raises(SystemExit, match="too few"):
            rate(few)


def test_ratios_are_medians_of_the_rounds() -> None:
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0
    # Seconds: throughput is the other way round.
    assert engine.over({"a": [1.0, 2.0, 4.0], "b": [2.0, 2.0, 2.0]}, "a", "b") == 1.0
    with pytest.raises(ValueError, match="zip"):
        median_ratio([1.0], [1.0, 2.0])


def test_figures_of_the_engine_by_hand() -> None:
    seconds = {
        "bare": [2.0, 2.0, 2.0],
        "active": [4.0, 4.0, 5.0],
        "active_k4": [8.0, 8.0, 8.0],
        "routed_unclaimed": [2.0, 2.0, 2.0],
        "routed_claimed": [8.0, 8.0, 8.0],
        "peft": [6.0, 6.0, 5.0],
        "peft_k4": [10.0, 10.0, 10.0],
        "peft_plain": [12.0, 12.0, 12.0],
    }
    assert engine.figures(seconds, 64) == {
        "active_over_bare": 0.5,
        "over_peft": 1.5,
        "over_peft_k4": 1.25,
        "over_peft_plain": 3.0,
        "routed_unclaimed_over_bare": 1.0,
        "routed_claimed_over_bare": 0.25,
        "texts_per_second": 16.0,
        "texts_per_second_bare": 32.0,
    }


def test_what_was_refused_while_sets_change_is_counted_and_waited() -> None:
    steady = [[answered(0.0, 0.5), answered(0.0, 1.0)], [answered(0.0, 2.0)]]
    refused = [Sample(0.0, 3.0, 0, 503, 1.0), Sample(0.0, 0.5, 0, 503, 1.0)]
    changing = [[answered(0.0, 0.5), refused[0]], [answered(0.0, 2.0), refused[1]]]
    assert swap_figures(steady, changing) == {
        "p99_during_swap": 2.0,  # 3 over 1, and 2 over 2
        "p99_ms": 1500.0,
        "p99_changing_ms": 2500.0,
        "p50_ms": 1375.0,
        "refused_steady": 0,
        "refused_changing": 2,
    }


def test_the_quickest_size_is_found() -> None:
    now, asked = 0.0, list[int]()
    takes = {64: [90.0, 3.0, 4.0], 32: [9.0, 2.0], 16: [5.0, 6.0]}  # the very first turn only warms up

    def way(size: int) -> None:
        nonlocal now
        asked.append(size)
        now += takes[size].pop(0)

    assert engine.quickest(way, [64, 32, 16], clock=lambda: now) == 32  # the better of its two turns
    assert asked == [64, 64, 32, 16, 64, 32, 16]
    takes[8] = [1.0]
    assert engine.quickest(way, [8], clock=lambda: now) == 8


def test_every_way_answers_every_text(llm: FrozenLLM) -> None:
    found, passes = engine.ways(llm, [TEXTS, TEXTS[::-1]], 4)
    assert {name for pair in engine.RATIOS.values() for name in pair} == set(found)
    assert passes == {"peft": 4, "peft_k4": 4, "peft_plain": 4}
    answers = {name: way(1) for name, way in found.items()}
    assert {len(answer) for answer in answers.values()} == {len(TEXTS)}
    assert [r.base for r in answers["routed_unclaimed"]] == [r.answer for r in answers["routed_unclaimed"]]
    assert all(not r.claims for r in answers["routed_unclaimed"])
    assert all(r.claims == (0,) for r in answers["routed_claimed"])
    assert [a.label for a in answers["bare"]] == [r.base.label for r in answers["routed_claimed"]]
    assert answers["peft"] == answers["peft_plain"]  # `logits_to_keep` changes what it costs
    figures = engine.figures(interleaved(found, 1), len(TEXTS))
    assert all(value > 0 for value in figures.values())


def test_peft_answers_in_the_order_of_its_texts(llm: FrozenLLM) -> None:
    soft = engine.prompt(llm, 0).embeddings
    peft = engine.Peft(llm, soft, last_only=True)
    mixed = [*TEXTS[:3], "good", "the director and the acting and the plot and the story is awful", "bad movie"]
    # One at a time nothing is padded or sorted.
    assert peft.answers(mixed, 1) == [peft.answers([text], 1)[0] for text in mixed]


def test_nothing_differs_from_plain_concatenation(llm: FrozenLLM) -> None:
    found = engine.differences(llm, TEXTS)
    assert set(found) == {*engine.STACKS, "active_of_peft", "active_k4_of_peft"}
    assert all(value < 1e-4 for value in found.values())
