"""The benches of consistency and load, on real processes with a tiny model; and that they find what is wrong."""

from __future__ import annotations

import dataclasses
import io
import json
import math

import pytest
from databases import postgres_admin_url
from rich.console import Console
from tiny_models import make_tiny_model

from app.settings import Settings
from app.vault import Vault
from bench import load, replicas
from bench.clients import LEFT, Sample
from bench.consistency import Answer, Change, Verdict, judge
from bench.load import Reading, fit_line
from bench.probes import NoProbes, Probes, find_probes
from models.inference import Classifier
from models.llm import FrozenLLM
from models.routing import Routes, classify_routed

pytestmark = pytest.mark.slow

WORDS = ("film", "movie", "plot", "story", "scene", "director", "acting", "text", "good", "bad", "great", "awful")
TEXTS = [" ".join(WORDS[(i * 7 + j * (i + 3)) % len(WORDS)] for j in range(2 + i % 9)) for i in range(150)]
GOOD = Verdict(False, False, False)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Settings:
    model = make_tiny_model(tmp_path_factory.mktemp("model") / "llama")
    return Settings(
        _env_file=None, home=tmp_path_factory.mktemp("home"), model=str(model), quantization="none", device="cpu"
    )


@pytest.fixture(scope="module")
def probes(settings: Settings) -> Probes:
    return find_probes(settings, TEXTS, 8, teach=(0, 5))


# --- the judge -------------------------------------------------------------------------------------------------------

# Text 0 is hidden under version 6 only, text 1 under 5 and 6, text 2 never.
HISTORY = [
    Change(5, 0.0, 1.0, frozenset({1})),
    Change(6, 10.0, 11.0, frozenset({0, 1})),
    Change(7, 20.0, 21.0, frozenset()),
]
LABELS = ["positive", "negative", "positive"]


@pytest.mark.parametrize(
    ("started", "ended", "text", "version", "label", "verdict"),
    [
        (2.0, 3.0, 0, 5, "positive", GOOD),
        (2.0, 3.0, 1, 5, "unknown", GOOD),
        (11.0, 12.0, 0, 6, "unknown", GOOD),  # asked for in the moment of the acknowledgement
        (10.9, 30.0, 0, 5, "positive", GOOD),  # asked for before it: however late it comes
        (10.9, 30.0, 0, 7, "positive", GOOD),
        (2.0, 10.5, 0, 6, "unknown", GOOD),  # in force before it is acknowledged
        (11.0, 12.0, 0, 5, "positive", Verdict(True, True, False)),  # the old set, and it shows
        (11.0, 12.0, 2, 5, "positive", Verdict(True, False, False)),  # the old set, and it does not show
        (11.0, 12.0, 0, 6, "positive", Verdict(False, True, False)),  # the new number on the old answer
        (22.0, 23.0, 0, 7, "unknown", Verdict(False, True, False)),  # still hidden after the revoke
        (2.0, 3.0, 2, 5, "negative", Verdict(False, True, False)),  # somebody else's answer
        (2.0, 22.0, 0, 6, "positive", Verdict(False, True, False)),  # possible then, but not under the version it names
        (2.0, 10.0, 0, 6, "unknown", Verdict(False, True, True)),  # nobody had asked for version 6 yet
        (2.0, 30.0, 2, 8, "positive", Verdict(False, True, True)),  # there is no such version
        (22.0, 23.0, 2, 4, "positive", Verdict(True, True, False)),
    ],
)
def test_an_answer_is_judged_by_what_was_acknowledged(
    started: float, ended: float, text: int, version: int, label: str, verdict: Verdict
) -> None:
    assert judge([Answer(0, started, ended, text, version, label)], HISTORY, LABELS) == [verdict]


def test_a_history_has_no_gaps() -> None:
    early = Answer(0, 0.5, 2.0, 2, 5, "positive")
    for answers, history in (
        ([], [HISTORY[0], HISTORY[2]]),
        ([], [HISTORY[0], dataclasses.replace(HISTORY[1], started=0.5)]),
        ([early], HISTORY),
    ):
        with pytest.raises(ValueError, match="version"):
            judge(answers, history, LABELS)


# --- probes ----------------------------------------------------------------------------------------------------------


def test_a_prompt_changes_its_text_and_no_other(settings: Settings, probes: Probes) -> None:
    llm = FrozenLLM.load(settings.model, quantization="none", device="cpu")
    classifier, vault = Classifier(llm), Vault(bytes(range(32)))

    def hidden(kind: str, index: int) -> list[bool]:
        route = probes.route(index, kind, vault, seed=1)
        routes = Routes([route], {probes.space.digest: probes.space}, fingerprint=llm.fingerprint)
        found = classify_routed(classifier, routes, probes.texts, digest=vault.gate_digest, max_prompts=4)
        assert [f.base.label for f in found] == probes.labels
        claimed = kind in ("certain", "claim", "taught")
        assert [bool(f.claims) for f in found] == [claimed and i == index for i in range(8)]
        assert not (kind in ("claim", "taught") and any(f.guarded or f.certain for f in found))  # the prompt decides
        return [f.answer.abstained and (f.guarded or f.certain or kind == "taught") for f in found]

    assert "unknown" not in probes.labels and len(set(probes.labels)) == 2
    for index in (0, 5):
        alone = [i == index for i in range(8)]
        assert hidden("guard", index) == hidden("certain", index) == hidden("taught", index) == alone
        assert not any(hidden("claim", index)) and not any(hidden("idle", index))


def test_too_few_decisive_texts_are_an_error(settings: Settings) -> None:
    with pytest.raises(NoProbes, match="are needed"):
        find_probes(settings, [TEXTS[0], TEXTS[0].upper(), "", *TEXTS[1:3]], 5)


# --- consistency -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(postgres_admin_url() is None, reason="no PostgreSQL listens")
def test_replicas_are_never_stale_and_what_is_stale_is_found(settings: Settings) -> None:
    admin = postgres_admin_url()
    assert admin is not None
    options = replicas.Options(rounds=7, clients=1, down=0.0)
    now = replicas.trial(
        settings, TEXTS, replicas=2, postgres=admin, options=options, console=Console(file=io.StringIO())
    )
    found = replicas.figures(now)
    assert {name: found[name] for name in replicas.FAULTS} == dict.fromkeys(replicas.FAULTS, 0)
    assert replicas.faults(found, options) == []
    assert (found["replicas"], found["rounds"], found["kills"]) == (2, 7, 1)
    # Seven times in and out, and once out and in again between: every one confirmed by all that lived.
    assert found["acknowledgements"] == 16 and len(now.history) == 17
    assert {kind: len(times) for kind, times in now.confirmed.items()} == {"activate": 7, "revoke": 7, "restore": 2}
    assert found["answers_checked"] > 2 * 14 + 30
    assert found["answered_after_kill"] > 10 and found["answers_after_restart"] >= 2
    assert found["versions_missed"] > 0 and math.isfinite(found["seconds_away"])
    json.dumps(found)

    # The same answers, one of them as a replica that did not look would have given it.
    last, tried = now.history[-2].acknowledged, 0
    for number, samples in enumerate(now.samples):
        for place, sample in enumerate(samples):
            if sample.start > last and sample.status == 200:
                answer = {**sample.answer, "active_set_version": now.history[-3].version}
                changed = [list(part) for part in now.samples]
                changed[number][place] = dataclasses.replace(sample, raw=json.dumps(answer).encode())
                doctored = replicas.figures(dataclasses.replace(now, samples=changed))
                assert doctored["stale_by_version"] == 1
                tried += 1
                break
    assert tried > 0
    # A failure of a replica that was not killed is an error, of the one that was it is not.
    assert now.killed is not None
    victim, when = now.killed
    for number in range(2):
        for sample, key in (
            (Sample(when, when + 0.01, 0, 0, error="ConnectionResetError"), "broken_connections"),
            (Sample(when, when + 0.01, 0, 500), "errors_5xx_other"),
            (Sample(when, when + 0.01, 0, 503), "errors_5xx_other"),
            (Sample(when, when + 0.01, 0, 401), "errors_other"),
        ):
            changed = [[*samples, sample] if i == number else samples for i, samples in enumerate(now.samples)]
            counted = replicas.figures(dataclasses.replace(now, samples=changed))[key]
            assert counted == int(number != victim.number or sample.status != 0)


def test_what_was_not_tried_has_failed() -> None:
    killing, sparing = replicas.Options(rounds=7), replicas.Options(rounds=7, down=None)
    good = {**dict.fromkeys(replicas.FAULTS, 0), "rounds": 7, "kills": 1, "answered_after_kill": 9}
    spared = {**good, "kills": 0}
    del spared["answered_after_kill"], spared["first_answers_after_restart_stale"]
    assert replicas.faults(good, killing) == replicas.faults(spared, sparing) == []
    assert replicas.faults(spared, killing) == ["kills"]
    assert replicas.faults({**good, "answered_after_kill": 0}, killing) == ["answered_after_kill"]
    assert replicas.faults({**good, "rounds": 6}, killing) == ["rounds"]
    assert replicas.faults({**good, "stale_by_label": 1, "rounds": 6}, killing) == ["stale_by_label", "rounds"]


# --- load ------------------------------------------------------------------------------------------------------------


def test_a_server_under_load_gives_everyone_their_own_answer(settings: Settings) -> None:
    options = load.Options(clients=8, seconds=6.0, texts=12, prompts=3, claimed=1, leave=0.5)
    found = load.measure(settings, TEXTS, postgres=None, options=options, console=Console(file=io.StringIO()))
    # Seconds after its start a server still grows.
    assert [name for name in load.FAULTS if found[name] and name != "rss_grows"] == []
    assert found["answered"] > 0 and found["left"] > 0
    assert found["answered"] + found["left"] + found["refused_503"] == found["asked"]
    assert 0 < found["p50_ms"] <= found["p90_ms"] <= found["p99_ms"] <= found["max_ms"]
    assert found["rss_start_mb"] > 50 and math.isfinite(found["rss_slope_percent_per_hour"])
    json.dumps(found)


def test_figures_of_load_by_hand(probes: Probes) -> None:
    def answer(*labels: str) -> bytes:
        return json.dumps({"results": [{"label": label} for label in labels], "active_set_version": 1}).encode()

    right = probes.labels
    other = {"positive": "negative", "negative": "positive"}
    samples = [
        Sample(0.0, 1.0, 0, 200, None, answer(right[0])),
        Sample(0.0, 3.0, 0, 200, None, answer("unknown")),  # claimed
        Sample(1.0, 2.0, 1, 200, None, answer(right[1])),
        Sample(2.0, 4.0, 1, 200, None, answer(other[right[1]])),  # another caller's
        Sample(4.0, 11.0, 1, 200, None, answer("unknown")),  # claimed by nobody, and too late to count as throughput
        Sample(1.0, 2.0, 2, 200, None, answer(right[2])),  # two texts, one answer
        Sample(1.0, 2.0, 1, 503, 1.0),
        Sample(1.0, 2.0, 1, 503),
        Sample(1.0, 2.0, 1, 500),
        Sample(1.0, 2.0, 1, 422),
        Sample(1.0, 2.0, 1, 0, error=LEFT),
        Sample(1.0, 2.0, 1, 0, error="ConnectionResetError"),
    ]
    assert load.wrong_labels(samples, [[0], [1], [2, 3]], probes, claimed=1) == 3
    readings = [Reading(float(t), (100 + (50 if t < 2 else t)) * 2**20, 9) for t in range(10)]
    options = load.Options(clients=3, seconds=10.0)
    found = load.figures(samples, readings, options)
    counts = ("asked", "answered", "refused_503", "other_5xx", "other_errors", "broken_connections", "left")
    assert [found[name] for name in counts] == [12, 6, 1, 2, 1, 1, 1]
    assert (found["per_second"], found["p50_ms"], found["p99_ms"]) == (0.5, 1000.0, 7000.0)
    # Warm after two seconds; then a MiB a second on 102.
    assert (found["rss_start_mb"], found["rss_end_mb"], found["rss_slope_stderr"]) == (102.0, 109.0, 0.0)
    assert found["rss_slope_percent_per_hour"] == pytest.approx(100 * 3600 / 102, abs=1e-3)
    assert found["rss_grows"]
    steady = [Reading(float(t), (100 + t % 2) * 2**20, 9) for t in range(60)]
    still = load.figures(samples, steady, options)
    assert not still["rss_grows"] and still["rss_undecided"], "a minute of a MiB up and down tells nothing"
    with pytest.raises(ValueError, match="nothing"):
        load.figures([Sample(0.0, 1.0, 0, 503, 1.0)], readings, options)


@pytest.mark.parametrize(
    ("slope", "noise", "grows", "undecided"),
    [
        (0.9, 0.0, False, False),
        (1.1, 0.0, True, False),
        (10.0, 14.0, True, False),  # 10 ± 4.7: not two errors above the limit, and growth all the same
        (10.0, 20.0, False, True),  # 10 ± 6.7
        (0.0, 14.0, False, False),
    ],
)
def test_memory_grows_where_the_slope_is_above_the_limit_and_no_noise(
    slope: float, noise: float, grows: bool, undecided: bool
) -> None:
    """``slope``: percent an hour of 1,000 MiB; ``noise``: MiB that are added and taken away, with no trend."""
    mib = [1000 + 10 * slope * t / 3600 + noise * (1, -1, -1, 1)[t % 4] for t in range(300)]
    readings = [Reading(float(t), round(value * 2**20), 9) for t, value in enumerate(mib)]
    found = load.figures([Sample(0.0, 1.0, 0, 200, None, {"results": []})], readings, load.Options(seconds=300.0))
    told = (found["rss_slope_percent_per_hour"], found["rss_slope_stderr"])
    assert (found["rss_grows"], found["rss_undecided"]) == (grows, undecided), told


def test_a_line_by_hand() -> None:
    assert fit_line([0.0, 1.0, 2.0], [5.0, 7.0, 9.0]) == (5.0, 2.0, 0.0)
    # Residuals 1, -1, -1, 1 around a flat line: squares 4, spread 5, and no correlation that widens.
    first, slope, error = fit_line([0.0, 1.0, 2.0, 3.0], [3.0, 1.0, 1.0, 3.0])
    assert (first, slope, error) == pytest.approx((2.0, 0.0, math.sqrt(4 / 2 / 5)))
    # In blocks: residuals 1, 1, -1, -1, -1, -1, 1, 1, correlation 3/8 from one to the next.
    blocks = [3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 3.0, 3.0]
    _, slope, error = fit_line([float(t) for t in range(8)], blocks)
    assert (slope, error) == pytest.approx((0.0, math.sqrt(8 / 6 / 42) * math.sqrt((11 / 8) / (5 / 8))))
    with pytest.raises(ValueError, match="three"):
        fit_line([0.0, 1.0], [1.0, 2.0])


def test_texts_of_all_lengths() -> None:
    lengths = sorted(len(text.split()) for text in load.of_all_lengths(TEXTS, 400))
    assert lengths[0] == 1 and lengths[-1] > 100
    assert sum(length <= 12 for length in lengths) == pytest.approx(200, abs=40)
