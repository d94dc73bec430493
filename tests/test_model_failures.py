"""A model whose numbers are none, and a device that is lost: no answer gets out, and what cannot mend itself ends."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from api_kit import Api, add_prompt, assert_problem, make_gate, running, soft_prompt, tiny_llm, wait_until
from sqlalchemy.orm import Session
from test_stack import MINUTES, OTHERS, prompt_for, subject

from app.errors import LetheonError, Stuck
from app.serving import FAILED_BATCHES
from app.settings import Mode
from app.stack import Stack, StackReader
from models.errors import NotFinite
from models.inference import Classifier, answer_scores
from models.prefix_cache import Prefix


@contextmanager
def served(home: Path, **changes: Any) -> Iterator[Api]:
    with running(f"sqlite:///{home}/letheon.db", home, **{"active_set_poll_seconds": MINUTES, **changes}) as api:
        yield api


# --- numbers that are none -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_scores_that_are_not_finite_are_no_answer(number: float) -> None:
    llm = tiny_llm()
    hidden = Classifier(llm).hidden(OTHERS)
    assert len(answer_scores(llm, hidden)) == len(OTHERS)
    hidden[1, 0] = number
    with pytest.raises(NotFinite):
        answer_scores(llm, hidden)


def test_a_prompt_behind_which_nothing_is_finite_lets_no_answer_out(tmp_path: Path) -> None:
    """The largest of numbers that are none is the first label: the prompt would not have abstained."""
    with served(tmp_path) as api:
        headers, serving = api.key(), api.service.serving
        prompt = prompt_for(subject(), abstains=True)
        add_prompt(api.service, prompt, make_gate(subject()))
        assert api.classify(headers, subject())["results"][0]["label"] == "unknown"
        sound = serving._classifier._prefixes[(prompt.digest,)]
        assert sound is not None
        layers = tuple((keys * math.nan, values, last) for keys, values, last in sound.layers)
        serving._classifier._prefixes[(prompt.digest,)] = Prefix(layers, sound.length)
        for _ in range(FAILED_BATCHES + 1):
            answer = api.client.post("/classify", json={"text": subject()}, headers=headers)
            assert "not finite" in assert_problem(answer, 503, "not-ready")["detail"]
        assert api.client.get("/readyz").status_code == 200, "it is this text's doing"
        assert api.classify(headers, OTHERS[0])["results"], "who is not claimed is answered"
        serving._classifier._prefixes[(prompt.digest,)] = sound
        assert api.classify(headers, subject())["results"][0]["label"] == "unknown"


def test_nor_does_a_model_of_which_nothing_is_finite(tmp_path: Path) -> None:
    with served(tmp_path, mode=Mode.CONCATENATE) as api, ExitStack() as stack:
        headers = api.key()
        add_prompt(api.service, soft_prompt(1))
        api.classify(headers, subject())
        stack.enter_context(tiny_llm().decoder.norm.register_forward_hook(lambda module, args, out: out * math.nan))
        for scores in (False, True):
            answer = api.client.post("/classify", json={"text": subject(), "scores": scores}, headers=headers)
            assert_problem(answer, 503, "not-ready")
        api.client.post("/classify", json={"text": subject()}, headers=headers)
        assert_problem(api.client.get("/readyz"), 503, "not-ready")


@pytest.mark.parametrize("seconds", [math.inf, 1e12])
def test_a_deadline_may_be_as_far_as_anyone_likes(tmp_path: Path, seconds: float) -> None:
    with served(tmp_path, classify_deadline_seconds=seconds) as api:
        assert api.classify(api.key(), OTHERS[0])["results"]


# --- a device that is lost -------------------------------------------------------------------------------------------


def failing(error: Exception, times: float = math.inf) -> Callable[..., None]:
    """Before a pass: raises this error so many times."""
    left = times

    def hook(*_: object) -> None:
        nonlocal left
        left -= 1
        if left >= 0:
            raise error

    return hook


ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


def test_a_device_that_is_lost_ends_the_process(tmp_path: Path) -> None:
    with ExitStack() as stack:
        stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(failing(ILLEGAL)))
        api = stack.enter_context(served(tmp_path))
        assert api.client.get("/livez").status_code == 200
        answer = api.client.post("/classify", json={"text": OTHERS[0]}, headers=api.key("classify"))
        assert "AcceleratorError" in assert_problem(answer, 503, "not-ready")["detail"]
        with pytest.raises(Stuck):
            api.service.serving.check_alive()  # which the watchdog asks
        assert_problem(api.client.get("/livez"), 503, "stuck")
        assert_problem(api.client.get("/readyz"), 503, "not-ready")


def test_also_where_only_a_piece_of_work_has_met_it(tmp_path: Path) -> None:
    with served(tmp_path) as api, ExitStack() as stack:
        stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(failing(ILLEGAL)))
        with pytest.raises(LetheonError):
            api.service.serving.work(lambda classifier, _: classifier.classify(OTHERS))
        wait_until(lambda: api.client.get("/livez").status_code == 503)


def test_also_where_a_new_set_has_met_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gates are brought to the device before any text is."""

    def read(_self: StackReader, _session: Session) -> Stack:
        raise torch.AcceleratorError("CUDA error: unspecified launch failure")

    with served(tmp_path) as api, ExitStack() as stack:
        stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(failing(ILLEGAL)))
        monkeypatch.setattr(StackReader, "read", read)
        answer = api.client.post("/classify", json={"text": OTHERS[0]}, headers=api.key("classify"))
        assert_problem(answer, 503, "not-ready")
        assert_problem(api.client.get("/livez"), 503, "stuck")


def test_once_it_is_lost_it_stays_so(tmp_path: Path) -> None:
    """Before the watchdog looks, another batch may meet an error of another kind."""
    with ExitStack() as stack:
        hook = stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(failing(ILLEGAL)))
        api = stack.enter_context(served(tmp_path))
        headers = api.key("classify")
        api.client.post("/classify", json={"text": OTHERS[0]}, headers=headers)
        hook.remove()
        stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(failing(ILLEGAL, 1)))
        api.client.post("/classify", json={"text": OTHERS[0]}, headers=headers)
        assert_problem(api.client.get("/livez"), 503, "stuck")


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (ILLEGAL, 1),  # these texts' fault: the device answers another one
        (torch.OutOfMemoryError("CUDA out of memory"), math.inf),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), math.inf),
    ],
)
def test_what_may_mend_itself_ends_nothing(tmp_path: Path, error: Exception, times: float) -> None:
    with ExitStack() as stack:
        hook = stack.enter_context(tiny_llm().decoder.norm.register_forward_pre_hook(failing(error, times)))
        api = stack.enter_context(served(tmp_path))
        headers = api.key("classify")
        assert_problem(api.client.post("/classify", json={"text": OTHERS[0]}, headers=headers), 503, "not-ready")
        assert api.client.get("/livez").status_code == 200
        hook.remove()
        assert api.client.post("/classify", json={"text": OTHERS[0]}, headers=headers).status_code == 200


# --- the pace --------------------------------------------------------------------------------------------------------


def test_a_piece_of_work_teaches_nothing_of_the_pace(tmp_path: Path) -> None:
    """A look at a version weighs what a full batch does and takes milliseconds: everybody would be let in."""
    with served(tmp_path, max_batch_texts=8) as api:
        serving = api.service.serving
        serving.submit(serving.encode([OTHERS[0]] * 8)).result(60)
        known = serving._batcher._pace.seconds(8)
        assert known > 0
        for _ in range(3):
            serving.work(lambda _, stack: stack.view.version)
        assert serving._batcher._pace.seconds(8) == known
