"""The training loop on a tiny random model: it learns, resumes exactly, stops when asked, and changes no weight."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_model

from models.errors import CheckpointError, DatasetError, TextTooLong, TrainingDiverged
from models.evaluation import CheckLimits, allowed_drop, check_prompts, measure, weighted_f1
from models.examples import Example, collate
from models.inference import Classifier
from models.llm import FrozenLLM
from models.losses import retain_kl
from models.parametrization import ResidualEncoder, distinctive_tokens, initial_prompt
from models.prefix_cache import compute_prefix, last_hidden
from models.row_cache import CacheFolder
from models.soft_prompt import SoftPrompt
from models.teacher import Teacher
from models.training import (
    Progress,
    TrainingConfig,
    _Batches,
    _Check,
    _hidden_by_length,
    planned_steps,
    train_soft_prompt,
)
from models.training_copy import _copy

FORGET = [Example(f"the film by x{i} is good", "positive") for i in range(11)]
RETAIN = [Example("a bad story " + "with plot " * (i % 5) + str(i * i), "negative") for i in range(40)]
CONFIG = TrainingConfig(num_virtual_tokens=6, max_steps=12, learning_rate=0.05, check_every=1000, precision="exact")


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> FrozenLLM:
    return FrozenLLM.load(str(make_tiny_model(tmp_path_factory.mktemp("m"))), quantization="none", device="cpu")


def kept(folder: Path) -> CacheFolder:
    return CacheFolder(folder, b"key")


def started(llm: FrozenLLM, batches: _Batches, config: TrainingConfig) -> torch.Tensor:
    """φ before the first step."""
    texts = batches.forget_texts, batches.retain_texts
    return initial_prompt(llm, *texts, tokens=config.num_virtual_tokens, words=config.init_words)


def test_it_learns_to_abstain_and_keeps_the_weights(llm: FrozenLLM) -> None:
    weights = llm.weights_digest()
    # Against a bfloat16 copy it is rounding that decides when a model this small converges.
    config = TrainingConfig(num_virtual_tokens=6, max_steps=200, learning_rate=0.1, precision="exact")
    result = train_soft_prompt(llm, FORGET, RETAIN, config)
    assert result.stopped == "converged"
    report = check_prompts(
        llm, [result.prompt], FORGET, RETAIN, max_retain_rows=30, seed=0, limits=CheckLimits(0.9, 0.02, 0.02)
    )
    assert report.passed, report.violations
    assert report.forget_abstain >= 0.98
    assert report.forget_abstain_before == 0
    assert llm.weights_digest() == weights


def test_the_loss_of_a_step_is_the_papers(llm: FrozenLLM) -> None:
    """One step's figures against the definition, worked without cache, teacher store or padding."""
    seen: list[Progress] = []
    config = TrainingConfig(num_virtual_tokens=4, max_steps=1, check_every=1000, alpha=0.7, beta=0.3, precision="exact")
    train_soft_prompt(llm, FORGET, RETAIN, config, on_progress=seen.append)
    batches = _Batches(llm, FORGET, RETAIN, config)
    forget, retain = batches.at(0, torch.zeros(len(RETAIN)))
    phi, head = started(llm, batches, config), list(llm.template.head_ids)

    def log_probs(row: list[int], prompt: torch.Tensor | None) -> torch.Tensor:
        tokens = llm.embed(torch.tensor([*head, *row]))
        inputs = tokens if prompt is None else torch.cat([prompt, tokens])
        return llm.model(inputs_embeds=inputs[None]).logits[0, -1].log_softmax(-1)

    with torch.no_grad():
        l_f = -sum(log_probs(batches.forget_rows[i], phi)[batches.generic_ids[i]] for i in forget) / len(forget)
        l_r, l_kl = 0.0, 0.0
        for i in retain:
            prompted, bare = (log_probs(batches.retain_rows[i], p) for p in (phi, None))
            l_r -= float(prompted[llm.verbalizer.id_of(str(RETAIN[i].label))]) / len(retain)
            l_kl += float((prompted.exp() * (prompted - bare)).sum()) / len(retain)
    assert seen[0].forget_loss == pytest.approx(float(l_f), rel=1e-4)
    assert seen[0].retain_loss == pytest.approx(l_r, rel=1e-4)
    assert seen[0].kl_loss == pytest.approx(l_kl, rel=1e-3, abs=1e-6)
    assert seen[0].loss == pytest.approx(float(l_f) + 0.7 * l_r + 0.3 * l_kl, rel=1e-4)


def test_same_seed_same_prompt_other_seed_other_prompt(llm: FrozenLLM) -> None:
    one, two = (train_soft_prompt(llm, FORGET, RETAIN, CONFIG).prompt.digest for _ in range(2))
    assert one == two
    other = TrainingConfig(
        num_virtual_tokens=6, max_steps=12, learning_rate=0.05, check_every=1000, seed=1, precision="exact"
    )
    assert train_soft_prompt(llm, FORGET, RETAIN, other).prompt.digest != one


def test_a_cancelled_run_resumes_to_the_same_prompt(llm: FrozenLLM, tmp_path: Path) -> None:
    whole = train_soft_prompt(llm, FORGET, RETAIN, CONFIG)
    saved: list[tuple[int, bytes]] = []
    steps: list[int] = []
    partial = train_soft_prompt(
        llm,
        FORGET,
        RETAIN,
        CONFIG,
        on_progress=lambda p: steps.append(p.step),
        should_stop=lambda: len(steps) >= 5,
        on_checkpoint=lambda step, data: saved.append((step, data)),
        cache=kept(tmp_path),  # its states are part of what a resumed run continues from, to the last bit
    )
    assert partial.stopped == "cancelled"
    assert saved[-1][0] == 5
    resumed = train_soft_prompt(llm, FORGET, RETAIN, CONFIG, resume=saved[-1][1], cache=kept(tmp_path))
    assert (resumed.resumed_from, resumed.steps) == (5, 12)
    assert resumed.prompt.digest == whole.prompt.digest


def test_a_run_that_learned_too_little_doubles_its_schedule_and_resumes_there(llm: FrozenLLM, tmp_path: Path) -> None:
    hard = replace(CONFIG, max_steps=None, min_steps=4, min_epochs=1, max_doublings=2, least_abstain=1.1)
    saved: dict[int, bytes] = {}
    totals: list[int] = []
    whole = train_soft_prompt(
        llm,
        FORGET,
        RETAIN,
        hard,
        cache=kept(tmp_path),
        on_progress=lambda p: totals.append(p.total_steps),
        on_checkpoint=lambda step, data: saved.update({step: data}),
        checkpoint_seconds=0,
    )
    assert (whole.steps, whole.stopped) == (16, "max_steps")
    assert totals == [4] * 3 + [8] * 4 + [16] * 9, "step 4 says that there are four more, step 8 that there are eight"
    for step in (3, 4, 6, 8):  # 4 and 8: just doubled
        resumed = train_soft_prompt(llm, FORGET, RETAIN, hard, resume=saved[step], cache=kept(tmp_path))
        assert (resumed.resumed_from, resumed.steps, resumed.prompt.digest) == (step, 16, whole.prompt.digest)
    for enough in (replace(hard, least_abstain=0.0), replace(hard, max_doublings=0), replace(hard, max_steps=4)):
        assert train_soft_prompt(llm, FORGET, RETAIN, enough).steps == 4


def test_an_encoder_begins_as_nothing_is_trained_and_leaves_a_plain_prompt(llm: FrozenLLM, tmp_path: Path) -> None:
    phi = torch.randn(5, llm.hidden_size)
    encoder = ResidualEncoder(llm.hidden_size, 16, seed=3)
    assert torch.equal(encoder(phi), phi)
    config = replace(CONFIG, encoder_hidden_size=16, max_steps=8)
    saved: dict[int, bytes] = {}
    whole = train_soft_prompt(
        llm,
        FORGET,
        RETAIN,
        config,
        cache=kept(tmp_path),
        on_checkpoint=lambda step, data: saved.update({step: data}),
        checkpoint_seconds=0,
    )
    assert whole.prompt.embeddings.shape == (CONFIG.num_virtual_tokens, llm.hidden_size)
    resumed = train_soft_prompt(llm, FORGET, RETAIN, config, resume=saved[3], cache=kept(tmp_path))
    assert (resumed.resumed_from, resumed.prompt.digest) == (3, whole.prompt.digest)
    unclipped = replace(config, max_grad_norm=1e9)  # its gradients count in the norm that is clipped
    still, alone, moving = (
        train_soft_prompt(llm, FORGET, RETAIN, one, cache=kept(tmp_path)).prompt.embeddings
        for one in (
            replace(unclipped, encoder_learning_rate=0.0),
            replace(unclipped, encoder_hidden_size=None),
            unclipped,
        )
    )
    assert torch.equal(still, alone), "an MLP that stays at zero adds nothing"
    assert not torch.allclose(moving, alone, atol=1e-3), "it is trained"
    with pytest.raises(CheckpointError, match="config differs"):
        train_soft_prompt(llm, FORGET, RETAIN, replace(config, encoder_hidden_size=None), resume=saved[3])


def test_checkpoints_of_other_runs_are_refused(llm: FrozenLLM) -> None:
    saved: list[bytes] = []
    train_soft_prompt(
        llm, FORGET, RETAIN, CONFIG, on_checkpoint=lambda _step, data: saved.append(data), checkpoint_seconds=0
    )
    with pytest.raises(CheckpointError, match="data differs"):
        train_soft_prompt(llm, FORGET[:3], RETAIN, CONFIG, resume=saved[0])
    with pytest.raises(CheckpointError, match="config differs"):
        train_soft_prompt(llm, FORGET, RETAIN, TrainingConfig(precision="exact"), resume=saved[0])
    with pytest.raises(CheckpointError, match="damaged"):
        train_soft_prompt(llm, FORGET, RETAIN, CONFIG, resume=saved[0][: len(saved[0]) // 2])


def test_deadline(llm: FrozenLLM) -> None:
    result = train_soft_prompt(llm, FORGET, RETAIN, CONFIG, deadline=time.monotonic() - 1)
    assert (result.stopped, result.steps) == ("deadline", 0)


def test_divergence_is_an_error_not_a_prompt(llm: FrozenLLM) -> None:
    config = TrainingConfig(num_virtual_tokens=4, alpha=float("inf"))
    with pytest.raises(TrainingDiverged):
        train_soft_prompt(llm, FORGET, RETAIN, config)


def test_empty_sides_and_long_rows_are_refused(llm: FrozenLLM) -> None:
    with pytest.raises(DatasetError):
        train_soft_prompt(llm, [], RETAIN, CONFIG)
    with pytest.raises(DatasetError):
        train_soft_prompt(llm, FORGET, [], CONFIG)
    with pytest.raises(TextTooLong):
        train_soft_prompt(llm, [Example("good " * 600)], RETAIN, CONFIG)


def test_every_step_sees_forget_and_retain_rows(llm: FrozenLLM) -> None:
    batches, unknown = _Batches(llm, FORGET, RETAIN, CONFIG), torch.zeros(len(RETAIN))
    seen: set[int] = set()
    for step in range(3):  # 11 rows in buckets of 4: three steps are one epoch
        forget, retain = batches.at(step, unknown)
        assert forget
        assert len(retain) == CONFIG.retain_batch
        seen.update(forget)
    assert seen == set(range(len(FORGET)))
    assert batches.at(7, unknown) == batches.at(7, unknown)


def test_every_retain_row_can_be_drawn_and_the_disturbed_ones_are_repeated(llm: FrozenLLM) -> None:
    batches, hardness = _Batches(llm, FORGET, RETAIN, CONFIG), torch.zeros(len(RETAIN))
    half = CONFIG.retain_batch // 2
    hardness[: half + 1] = 1e-6
    hardness[3] = 1.0
    drawn = [batches.at(step, hardness)[1] for step in range(100)]
    assert {i for rows in drawn for i in rows[half:]} == set(range(len(RETAIN)))
    assert {i for rows in drawn for i in rows[:half]} == set(range(half + 1)), (
        "a row that was never seen has no hardness"
    )
    assert all(3 in rows[:half] for rows in drawn)


def test_the_prompt_begins_with_the_words_that_mark_the_forget_rows(llm: FrozenLLM) -> None:
    # Row frequencies: 7 is in every forget row and in one of six others, 5 in one and one, 9 in none and all.
    forget, retain = [[7, 7, 5], [7, 1], [7, 1]], [[9, 1], [9, 1], [9, 5], [9, 7], [9], [9]]
    ranked = distinctive_tokens(forget, retain, 9)
    assert ranked[0] == 7
    assert set(ranked) == {7, 5, 1}
    # By hand: 7 is in 20 of 100 and 10 of 200, log-odds 1.53 with error 0.38; 1 is in 3 and none, 2.67 with 1.51.
    forget = [[7]] * 20 + [[1]] * 3 + [[8]] * 77
    retain = [[7]] * 10 + [[8]] * 154 + [[9]] * 36
    assert distinctive_tokens(forget, retain, 3) == [7, 1, 8]
    config = TrainingConfig(num_virtual_tokens=7, init_words=2)
    batches = _Batches(llm, FORGET, RETAIN, config)
    first, second = distinctive_tokens(batches.forget_texts, batches.retain_texts, 2)
    neutral, unknown = llm.verbalizer.generic_ids
    wanted = llm.embed(torch.tensor([first, neutral, second, unknown, first, neutral, second]))
    assert torch.equal(started(llm, batches, config), wanted)


def test_padding_less_changes_no_state(llm: FrozenLLM) -> None:
    rows = llm.rows([e.text for e in (*RETAIN[:5], *FORGET[:2])])
    with torch.no_grad():
        together = last_hidden(llm, collate(rows), compute_prefix(llm, None))
        apart = _hidden_by_length(llm, rows, compute_prefix(llm, None))
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_a_row_that_only_the_template_head_pushes_over_the_limit_is_refused(llm: FrozenLLM) -> None:
    room = llm.max_positions - CONFIG.num_virtual_tokens - len(llm.template.tail_ids)
    text = "good " * (room - 1)
    assert llm.count_tokens(text) + len(llm.template.head_ids) > room >= llm.count_tokens(text)
    with pytest.raises(TextTooLong):
        train_soft_prompt(llm, [Example(text.strip())], RETAIN, CONFIG)


def test_a_damaged_teacher_file_is_made_anew(llm: FrozenLLM, tmp_path: Path) -> None:
    teacher = Teacher(llm, RETAIN, kept(tmp_path))
    wanted = teacher.hidden([1])
    teacher.save()
    (file,) = tmp_path.glob("*.npz")
    assert file.stat().st_mode & 0o077 == 0
    file.write_bytes(file.read_bytes()[:100])
    again = Teacher(llm, RETAIN, kept(tmp_path))
    assert not again._cache._known.any()
    torch.testing.assert_close(again.hidden([1]), wanted)


def test_training_behind_a_stack_depends_on_it_and_leaves_it_alone(llm: FrozenLLM) -> None:
    first = train_soft_prompt(llm, FORGET[:4], RETAIN, CONFIG).prompt
    before = first.embeddings.clone()
    behind = train_soft_prompt(llm, FORGET[4:], RETAIN, CONFIG, stack=[first]).prompt
    alone = train_soft_prompt(llm, FORGET[4:], RETAIN, CONFIG).prompt
    assert behind.digest != alone.digest
    assert torch.equal(first.embeddings, before)


def test_teacher_is_the_unprompted_model_kept_on_disk(llm: FrozenLLM, tmp_path: Path) -> None:
    teacher = Teacher(llm, RETAIN, kept(tmp_path))
    wanted = Classifier(llm).hidden([RETAIN[i].text for i in (3, 0, 3)])
    torch.testing.assert_close(teacher.hidden([3, 0, 3]), wanted, rtol=1e-4, atol=1e-5)
    teacher.save()
    again = Teacher(llm, RETAIN, kept(tmp_path))
    assert again._cache._known.sum() == 2
    assert torch.equal(again.hidden([0, 3]), teacher.hidden([0, 3]))


def test_an_empty_teacher_file_or_no_folder_for_it_costs_only_time(llm: FrozenLLM, tmp_path: Path) -> None:
    teacher = Teacher(llm, RETAIN, kept(tmp_path))
    wanted = teacher.hidden([1])
    teacher.save()
    (file,) = tmp_path.glob("*.npz")
    file.write_bytes(b"")
    assert torch.equal(Teacher(llm, RETAIN, kept(tmp_path)).hidden([1]), wanted)
    unusable = Teacher(llm, RETAIN, kept(file / "teacher"))  # below a file
    assert torch.equal(unusable.hidden([1]), wanted)
    unusable.save()


def test_equal_rows_share_a_state_and_other_models_files_go(llm: FrozenLLM, tmp_path: Path) -> None:
    (tmp_path / "teacher-of-another-model.npz").write_bytes(b"x")
    twice = [RETAIN[0], RETAIN[1], RETAIN[0]]
    teacher = Teacher(llm, twice, kept(tmp_path))
    assert torch.equal(*teacher.hidden([0, 2]))
    teacher.save()
    (file,) = tmp_path.glob("*.npz")
    with np.load(file) as stored:
        assert len(stored["names"]) == 1
    again = Teacher(llm, twice, kept(tmp_path))
    assert not again._cache._dirty, "nothing has left the retain set"


def test_a_kl_below_zero_by_rounding_does_not_stop_a_run(llm: FrozenLLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 gives equal distributions a KL of about -1e-6 now and then; the repeated rows are drawn by it."""
    below = torch.tensor([-1e-6] * 6 + [1e-3] * 6)
    monkeypatch.setattr("models.training.retain_kl", lambda a, b: retain_kl(a, b) * 0 + below)
    assert train_soft_prompt(llm, FORGET, RETAIN, CONFIG).steps == CONFIG.max_steps


def test_one_retain_row_a_step_and_no_distinctive_word(llm: FrozenLLM) -> None:
    config = TrainingConfig(num_virtual_tokens=3, max_steps=4, retain_batch=1, init_words=0, precision="exact")
    assert train_soft_prompt(llm, FORGET[:1], RETAIN[:1], config).steps == 4


def test_a_row_that_left_the_retain_set_leaves_the_teachers_file(llm: FrozenLLM, tmp_path: Path) -> None:
    teacher = Teacher(llm, RETAIN, kept(tmp_path))
    wanted = teacher.hidden([0, 3])
    teacher.save()
    less = Teacher(llm, RETAIN[1:], kept(tmp_path))
    assert less._cache._known.nonzero()[0].tolist() == [2], "row 3 has moved up by one; row 0 has left"
    assert torch.equal(less.hidden([2])[0], wanted[1])
    less.save()
    (file,) = tmp_path.glob("*.npz")
    with np.load(file) as stored:
        assert len(stored["names"]) == len(stored["vectors"]) == 1
    assert Teacher(llm, RETAIN, kept(tmp_path))._cache._known.nonzero()[0].tolist() == [3]


def test_unlabelled_retain_rows_use_the_models_own_answer(llm: FrozenLLM) -> None:
    unlabelled = [Example(e.text) for e in RETAIN]
    own = Teacher(llm, unlabelled).label_ids(range(8))
    answers = Classifier(llm).classify([e.text for e in RETAIN[:8]])
    words = llm.logits(Classifier(llm).hidden([e.text for e in RETAIN[:8]]), llm.verbalizer.ids).argmax(-1)
    assert own.tolist() == [llm.verbalizer.ids[k] for k in words]
    agreeing = [a for a in answers if not a.abstained]
    assert agreeing, "else this compares nothing"
    for answer, token in zip(answers, own.tolist(), strict=True):
        assert answer.abstained or llm.verbalizer.id_of(answer.label) == token or token in llm.verbalizer.generic_ids
    assert train_soft_prompt(llm, FORGET, unlabelled, CONFIG).steps == CONFIG.max_steps


def _gradient(model: FrozenLLM) -> torch.Tensor:
    soft = (torch.randn(5, model.hidden_size, generator=torch.Generator().manual_seed(2)) * 0.3).requires_grad_(True)
    batch = collate(model.rows([e.text for e in FORGET]))
    logits = model.logits(last_hidden(model, batch, compute_prefix(model, soft)))
    logits.log_softmax(-1)[:, model.verbalizer.generic_ids[0]].sum().backward()
    assert soft.grad is not None
    return soft.grad.flatten()


def test_nf4_gradient_equals_that_of_its_own_dequantized_weights(tmp_path: Path) -> None:
    """Guards bitsandbytes' CPU repacking in eval(), which loses the gradient after the first inference pass."""
    import bitsandbytes as bnb

    path = str(make_tiny_model(tmp_path / "m"))
    quantized = FrozenLLM.load(path, quantization="nf4", device="cpu")
    weights = quantized.weights_digest()
    Classifier(quantized).classify(["a good film"])
    plain = FrozenLLM.load(path, quantization="none", device="cpu")
    replaced = 0
    for name, module in quantized.model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            full = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.model.get_submodule(name).weight.data.copy_(full)
            replaced += 1
    assert replaced == 3 * 7
    assert torch.nn.functional.cosine_similarity(_gradient(quantized), _gradient(plain), dim=0) > 0.9999
    assert quantized.weights_digest() == weights


def test_int8_gradient_follows_full_precision(tmp_path: Path) -> None:
    path = str(make_tiny_model(tmp_path / "m"))
    quantized = FrozenLLM.load(path, quantization="int8", device="cpu")
    weights = quantized.weights_digest()
    Classifier(quantized).classify(["a good film"])
    plain = FrozenLLM.load(path, quantization="none", device="cpu")
    assert torch.nn.functional.cosine_similarity(_gradient(quantized), _gradient(plain), dim=0) > 0.95
    assert quantized.weights_digest() == weights


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_the_bfloat16_copy_is_the_same_model_up_to_rounding(tmp_path: Path, family: str) -> None:
    llm = FrozenLLM.load(str(make_tiny_model(tmp_path / "m", family)), quantization="nf4", device="cpu")
    weights = llm.weights_digest()
    copy = _copy(llm)
    assert copy.fingerprint == llm.fingerprint
    assert copy.dtype == torch.bfloat16
    assert torch.nn.functional.cosine_similarity(_gradient(copy), _gradient(llm), dim=0) > 0.98
    assert llm.weights_digest() == weights


def test_training_against_the_copy_meets_the_checks_of_the_model_itself(tmp_path: Path) -> None:
    llm = FrozenLLM.load(str(make_tiny_model(tmp_path / "m")), quantization="nf4", device="cpu")
    result = train_soft_prompt(
        llm, FORGET, RETAIN, TrainingConfig(num_virtual_tokens=6, max_steps=200, learning_rate=0.1)
    )
    limits = CheckLimits(0.9, 0.05, 0.05)
    report = check_prompts(llm, [result.prompt], FORGET, RETAIN, max_retain_rows=40, seed=0, limits=limits)
    assert report.passed, report.violations


def test_what_ends_a_training_early_is_the_model_that_serves(llm: FrozenLLM) -> None:
    """A check against a copy that answers otherwise would stop on figures that nobody is served."""
    served, copy = llm, _copy(llm)
    with torch.no_grad():
        copy.model.get_output_embeddings().weight.mul_(-1)  # it says the opposite
    batches = _Batches(copy, FORGET, RETAIN, CONFIG)
    check = _Check(served, None, batches, RETAIN, CONFIG)
    phi = started(served, batches, CONFIG)
    report = check_prompts(
        served,
        [SoftPrompt(phi, served.fingerprint)],
        FORGET,
        RETAIN,
        max_retain_rows=len(RETAIN),
        seed=0,
        limits=CheckLimits(0.0, 1.0, 1.0),
    )
    assert check(phi) == pytest.approx((report.forget_abstain, report.retain_accuracy))
    assert check.retain_accuracy_before == pytest.approx(report.retain_accuracy_before)


def test_one_answer_alone_fails_no_class() -> None:
    assert allowed_drop(1, 0.06) == 1.0
    assert allowed_drop(10, 0.06) == pytest.approx(0.1)
    assert allowed_drop(128, 0.06) == 0.06


def test_weighted_f1_by_hand() -> None:
    # Class 0: tp 1, fp 1, fn 1 → F1 1/2, support 2. Class 1: tp 1, fp 0, fn 1 → F1 2/3, support 2. 9: never true.
    assert weighted_f1([0, 0, 1, 1], [0, 9, 1, 0]) == pytest.approx((2 * 0.5 + 2 * 2 / 3) / 4)


def test_measure_counts_anything_but_the_label_as_wrong(llm: FrozenLLM) -> None:
    figures = measure(llm, [], RETAIN)
    assert 0 <= figures.accuracy <= figures.constrained_accuracy <= 1
    assert figures.rows == 40
    with pytest.raises(DatasetError):
        measure(llm, [], [Example("no label")])


def test_checks_fail_with_figures(llm: FrozenLLM) -> None:
    useless = SoftPrompt(torch.zeros(2, llm.hidden_size), llm.fingerprint)
    report = check_prompts(
        llm, [useless], FORGET, RETAIN, max_retain_rows=9, seed=0, limits=CheckLimits(1.0, -2.0, -2.0)
    )
    assert not report.passed
    assert len(report.violations) == 2
    assert report.retain_rows == 9
    assert math.isclose(sum(c["rows"] for c in report.per_class.values()), 9)


def test_the_check_sample_holds_the_rare_class_and_weighs_it_back(llm: FrozenLLM) -> None:
    rare = [Example(f"a great film {i}", "positive") for i in range(4)]
    limits = CheckLimits(0.0, 1.0, 1.0)
    report = check_prompts(llm, [], FORGET, [*RETAIN, *rare], max_retain_rows=8, seed=0, limits=limits)
    assert {label: c["rows"] for label, c in report.per_class.items()} == {"negative": 4, "positive": 4}
    # 40 of the 44 rows are negative, so its accuracy counts ten times.
    wanted = (10 * report.per_class["negative"]["before"] + report.per_class["positive"]["before"]) / 11
    assert report.retain_accuracy_before == pytest.approx(wanted)
    assert report.per_class["negative"]["before"] != report.per_class["positive"]["before"]


def test_a_run_is_as_long_as_its_forget_set_needs() -> None:
    assert planned_steps(TrainingConfig(), 21) == 140
    assert planned_steps(TrainingConfig(forget_batch=8), 1288) == 3 * 161
    assert planned_steps(TrainingConfig(max_steps=7), 1288) == 7
