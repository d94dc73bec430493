"""The benches' own arithmetic: wrong figures look just like right ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from peft import PromptEncoderConfig, get_peft_model
from rich.console import Console
from tiny_models import make_tiny_model

from app.settings import get_settings
from bench import activation, plots, routing_cost, sequence, training, tuned
from models.examples import Example
from models.gate import fit_space
from models.inference import Classification, Classifier
from models.llm import FrozenLLM
from models.teacher import Teacher
from models.text_states import text_states

WORDS = ["the", "film", "is", "good", "bad", "movie", "great", "awful", "director", "acting", "plot", "story", "scene"]
TEXTS = [" ".join(WORDS[(i * 7 + j * (i + 3)) % len(WORDS)] for j in range(2 + i % 7)) for i in range(130)]
RECORDED = Path(__file__).parents[1] / "docs" / "bench"


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLLM:
    folder = make_tiny_model(tmp_path_factory.mktemp("llama"), "llama")
    return FrozenLLM.load(str(folder), quantization="none", device="cpu")


def test_cost_counts_claims_and_memory(llm: FrozenLLM) -> None:
    space = fit_space(text_states(llm, TEXTS[:40]), 4, fingerprint=llm.fingerprint)
    found = routing_cost.measure(llm, space, TEXTS, requests=5, directions=2, rounds=1, singles=2)
    width = len(space.center)
    # Prompt in float32, directions in float32 and float64, 16 digests.
    assert found["memory_mib_per_request"] == pytest.approx(
        (4 * 30 * llm.hidden_size + 2 * width * 12 + 16 * 32) / 2**20, abs=1e-4
    )
    json.dumps(found)
    assert all(value > 0 for name, value in found.items() if "_over_" in name)


def test_prefixes_of_their_own_in_one_batch_give_what_one_by_one_gives(llm: FrozenLLM) -> None:
    found = routing_cost.arrangements(Classifier(llm), TEXTS[:6], rounds=1, claimed=3)
    assert set(found) == {"gate_layers_over_pass", "3_prompts_apart_over_pass", "3_prompts_in_one_batch_over_pass"}


def test_ratios_are_of_the_same_round() -> None:
    assert routing_cost.paired([2.0, 30.0], [1.0, 10.0]) == [2.0, 3.0]
    assert routing_cost.quantile([float(i) for i in range(200)], 0.99) == 197.0
    assert [routing_cost.quantile([3.0, 1.0, 2.0, 4.0], q) for q in (0.0, 0.5, 0.99)] == [1.0, 2.0, 4.0]


def test_figures_by_hand() -> None:
    """Two persons; row 0 to 1 of a, 2 of b, 3 to 4 unseen, 5 to 8 held out, 9 on others."""

    def said(label: str) -> Classification:
        return Classification(label, label == "unknown", {label: 1.0})

    answers = sequence.Answers.__new__(sequence.Answers)
    names = {"own a": range(2), "own b": range(2, 3), "unseen a": range(3, 4), "unseen b": range(4, 5)}
    answers.places = {**names, "held out": range(5, 9), "others": range(9, 10)}
    answers.rows = [Example(f"text {i}", "positive") for i in range(10)]
    answers.base = [said("positive") for _ in range(8)] + [said("negative"), said("positive")]
    persons = [sequence.Person(n, [Example("text 1", "positive")], []) for n in ("a", "b")]
    changed = {0: "unknown", 2: "unknown", 3: "unknown", 5: "unknown", 8: "positive"}
    found = sequence.figures(answers, persons, changed)
    assert (found["own_first"], found["own_worst"], found["own_mean"]) == (0.5, 0.5, 0.75)
    assert (found["unseen_first"], found["unseen_worst"], found["unseen_mean"]) == (1.0, 0.0, 0.5)
    assert found["retain_base"] == 0.75 and found["retain_drop"] == 0.0  # one lost, one won
    assert found["retain_drop_interval"] == pytest.approx([-0.75, 0.75], abs=0.25)
    assert (found["false_abstain"], found["false_abstain_other_people"]) == (0.25, 0.0)
    guarded = sequence.guard(answers, persons, changed)
    assert guarded[1] == "unknown" and sequence.figures(answers, persons, guarded)["own_worst"] == 1.0


@pytest.mark.parametrize("bench", sorted(file.stem for file in RECORDED.glob("*.json")))
def test_what_is_recorded_is_one_json_line_and_can_be_drawn(
    bench: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = (RECORDED / f"{bench}.json").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["bench"] == bench.split(".")[0]
    if bench not in plots.PICTURES:
        return
    (tmp_path / f"{bench}.json").write_text(line, encoding="utf-8")
    pictures = []
    for out in ("once", "twice"):
        monkeypatch.setattr(sys, "argv", ["plots", "--results", str(tmp_path), "--out", str(tmp_path / out)])
        plots.main()
        pictures.append((tmp_path / out / f"{bench}.svg").read_bytes())
    assert pictures[0] == pictures[1] and b"</svg>" in pictures[0]


def test_synthetic_gates_claim_nothing_of_the_traffic(llm: FrozenLLM) -> None:
    states = text_states(llm, TEXTS)
    space = fit_space(states[:60], 4, fingerprint=llm.fingerprint)
    for route in routing_cost.synthetic(llm, space, states, 8, 3):
        claimed = space.points(states) @ route.gate.directions.T > route.gate.threshold
        assert not torch.any(claimed)


def eager_naive(llm: FrozenLLM, phi: torch.nn.Parameter, rows: training.Rows, labels: torch.Tensor) -> torch.Tensor:
    found: list[torch.Tensor] = []
    usual = llm.model.config._attn_implementation

    def step(_number: int) -> float:
        assert llm.model.config._attn_implementation == "eager"
        found.append(training.naive_loss(llm, phi, rows, labels))
        return 0.0

    training.eager(llm, step)(0)
    assert llm.model.config._attn_implementation == usual
    return found[0]


def test_all_ways_of_a_training_step_have_one_loss(llm: FrozenLLM) -> None:
    """Else their speeds could not be compared: Letheon's, naive and PEFT's, of the same φ."""
    examples = [Example(text, ("positive", "negative")[i % 2]) for i, text in enumerate(TEXTS[:40])]
    rows, teacher = training.pick(llm, examples, 3, 5, seed=1), Teacher(llm, examples)
    labels = teacher.label_ids(rows.picked)
    torch.manual_seed(0)
    encoder = PromptEncoderConfig(
        task_type="CAUSAL_LM", peft_type="P_TUNING", num_virtual_tokens=training.TOKENS, encoder_hidden_size=16
    )
    model = get_peft_model(llm.model, encoder)
    phi = torch.nn.Parameter(model.get_prompt(1)[0].detach().clone())
    ids, lengths = training.padded(llm, [*rows.forget, *rows.retain])
    found = [
        training.own_loss(llm, phi, rows, teacher),
        training.naive_loss(llm, phi, rows, labels),
        eager_naive(llm, phi, rows, labels),
        training.peft_loss(model, {"rows": rows, "ids": ids, "lengths": lengths, "label_ids": labels}),
    ]
    assert [float(loss.detach()) for loss in found] == pytest.approx([float(found[0].detach())] * 4, rel=1e-4)
    assert training.relative(*training.gradients(llm, examples)) < 1e-4


def test_compute_to_quality_is_of_the_prompts_that_pass(tmp_path: Path) -> None:
    recorded = tmp_path / "quality.json"
    assert training.compute_to_quality(recorded) is None
    compute = {
        "SPUL": {"over_paper": 0.01, "passes": False},
        "SPUL behind its gate": {"over_paper": 0.02, "passes": True},
    }
    for scale, expected in (("small", 0.02), ("smoke", None)):
        recorded.write_text(json.dumps({"scale": scale, "compute": compute}))
        assert training.compute_to_quality(recorded) == expected
    compute["SPUL behind its gate"]["passes"] = False
    for nothing in (compute, None):
        recorded.write_text(json.dumps({"scale": "small", "compute": nothing}))
        assert training.compute_to_quality(recorded) is None


def test_activation_is_measured_on_the_workers_own_job(
    llm: FrozenLLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    retain = tmp_path / "retain.jsonl"
    lines = [
        {"text": f"{activation.NAME} {text} {i}", "label": ("positive", "negative")[i % 2]}
        for i, text in enumerate(TEXTS)
    ]
    retain.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in {
        "MODEL": str(make_tiny_model(tmp_path / "model", "llama")),
        "QUANTIZATION": "none",
        "RETAIN": str(retain),
        "HOME": str(tmp_path / "home"),
        "NUM_VIRTUAL_TOKENS": "4",
        "CHECK_RETAIN_ROWS": "16",
    }.items():
        monkeypatch.setenv(f"LETHEON_{name}", value)
    get_settings.cache_clear()
    try:
        found = activation.measure(3, 2, Console(quiet=True))
    finally:
        get_settings.cache_clear()
    assert found["steps"] == {"first": 60, "last": 60}
    assert found["activation_last_over_first"] > 0


def test_what_comes_with_the_source_is_put_where_nothing_is(tmp_path: Path) -> None:
    made, work = tmp_path / "made", tmp_path / "work"
    for name in ("a/x.json", "a/x.safetensors", "b/y.json"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name)
    (work / "b").mkdir(parents=True)
    (work / "b" / "y.json").write_text("mine")
    tuned.unpack(made, work)
    assert {str(f.relative_to(work)): f.read_text() for f in work.rglob("*.*")} == {
        "a/x.json": "a/x.json",
        "a/x.safetensors": "a/x.safetensors",
        "b/y.json": "mine",
    }
    tuned.unpack(tmp_path / "nowhere", work)
