"""Prompts out of the service and into it: exports of what is sealed, imports that go the way of every request.

An import makes a request whose training is done already: the worker fits its gate, checks it as any other prompt, and
only then puts it in force. Nothing here commits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sqlalchemy.orm import Session

from app import active_set, audit, lifecycle, quotas, zip_files
from app.errors import Conflict, InvalidInput, NotReady, VaultError
from app.lifecycle import ForgetText
from app.pull import model_path
from app.settings import Settings
from app.tables import Prompt, PromptState, UnlearnRequest, utcnow
from app.terms import Terms
from app.vault import Vault
from models import finished, interop
from models.errors import ModelError
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from models.training import TrainingResult

Format = Literal["peft", "safetensors", "vllm"]
ZIP, TENSOR = "application/zip", "application/octet-stream"


@dataclass(frozen=True, repr=False)  # no repr: a prompt is personal data
class Export:
    """One file, and what it is. ``gate``: ``not exported`` where the prompt has one, else ``none``."""

    name: str
    media_type: str
    data: bytes
    digest: str
    gate: str


def export_prompt(
    session: Session, vault: Vault, llm: FrozenLLM, settings: Settings, prompt_id: str, kind: Format, *, actor: str
) -> Export:
    """The prompt in clear; the audit entry is the caller's to commit before a byte of it leaves.

    Raises NotFound, Conflict when it was revoked or is of another model than ``llm``, NotReady when it does not open.
    """
    row = _not_revoked(session, prompt_id)
    if row.fingerprint != llm.fingerprint:
        raise Conflict("the prompt is of another model than the one that this service runs")
    prompt = _open(vault, row, llm)  # before the lock: nobody's revoke is to wait for the key store
    name, media_type, data = _file(prompt, row, llm, settings, kind)
    active_set.lock_active_set(session)  # as a revoke does: after one that was acknowledged nothing is exported
    row = _not_revoked(session, prompt_id)
    detail = {"format": kind, "prompt_digest": prompt.digest}
    audit.append(session, actor=actor, action="prompt.exported", subject=row.id, detail=detail)
    return Export(name, media_type, data, prompt.digest, "none" if row.gate_digest is None else "not exported")


def _not_revoked(session: Session, prompt_id: str) -> Prompt:
    row = active_set.get_prompt(session, prompt_id)
    if row.state == PromptState.REVOKED:
        raise Conflict("the prompt was revoked, and is gone", state=row.state)
    return row


def _open(vault: Vault, row: Prompt, llm: FrozenLLM) -> SoftPrompt:
    try:
        data = active_set.open_prompt(vault, row)
        return SoftPrompt.from_bytes(data, fingerprint=llm.fingerprint, digest=row.digest)
    except (VaultError, ModelError) as error:
        raise NotReady(f"prompt {row.id} cannot be loaded ({type(error).__name__})") from error


def _file(prompt: SoftPrompt, row: Prompt, llm: FrozenLLM, settings: Settings, kind: Format) -> tuple[str, str, bytes]:
    if kind == "safetensors":
        return f"{row.id}.safetensors", TENSOR, interop.tensor_bytes(prompt)
    files = interop.peft_files if kind == "peft" else interop.vllm_files
    made = files(prompt, llm, base=_base_name(settings), mode=row.mode)
    return f"{row.id}-{kind}.zip", ZIP, zip_files.pack(made)


def _base_name(settings: Settings) -> str:
    """A hub id as it is; of a path its last part alone, for where it lies is nobody else's business."""
    source = settings.model or model_path(settings.home).name
    return Path(source).name if Path(source).exists() else source


def import_prompt(
    session: Session,
    vault: Vault,
    llm: FrozenLLM,
    settings: Settings,
    prompt: SoftPrompt,
    texts: Sequence[ForgetText],
    *,
    actor: str,
    reason: str | None,
    terms: Terms,
) -> UnlearnRequest:
    """A pending request for these texts, its training done: the prompt is sealed under its key, as a checkpoint.

    ``actor``: the id of an API key; where a second person has to agree, it takes another's. Raises InvalidInput,
    QuotaExceeded.
    """
    check_texts(llm, settings, texts, prompt.num_virtual_tokens)
    check_norm(llm, settings, prompt)
    quotas.check_request_quota(session, actor, settings, texts=len(texts), now=utcnow())
    # Said here, so that the worker's settings cannot make it the training of another try, which would be passed over.
    options = {"num_virtual_tokens": prompt.num_virtual_tokens, "seed": settings.seed}
    result = TrainingResult(prompt, steps=0, stopped="imported", seconds=0.0)
    request = lifecycle.create_request(
        session,
        vault,
        texts=texts,
        reason=reason,
        options=options,
        fingerprint=llm.fingerprint,
        api_key_id=actor,
        terms=terms,
        checkpoint=finished.pack(result, seed=settings.seed),
    )
    detail = {"prompt_digest": prompt.digest, "num_virtual_tokens": prompt.num_virtual_tokens, "format": "peft"}
    audit.append(session, actor=actor, action="prompt.imported", subject=request.id, detail=detail)
    return request


def check_texts(llm: FrozenLLM, settings: Settings, texts: Sequence[ForgetText], tokens: int) -> None:
    """As a submit checks them. Raises InvalidInput, which names the place of a text and never the text."""
    if not 0 < len(texts) <= settings.max_forget_texts:
        raise InvalidInput(f"there must be 1 to {settings.max_forget_texts} forget texts, and there are {len(texts)}")
    limit = llm.text_limit(settings.max_text_tokens, tokens)
    for number, item in enumerate(texts, start=1):
        if not item.text.strip():
            raise InvalidInput(f"text {number} is blank")
        if item.label is not None and item.label not in settings.labels:
            raise InvalidInput(f"the label of text {number} is none of " + ", ".join(settings.labels))
        count = llm.count_tokens(item.text)
        if count > limit:
            raise InvalidInput(f"text {number} has {count} tokens, the limit is {limit}")


def check_norm(llm: FrozenLLM, settings: Settings, prompt: SoftPrompt) -> None:
    """Known before a worker is asked for anything. Raises InvalidInput."""
    largest, _ = prompt.norms(llm.word_norm)
    if not largest <= settings.max_prompt_norm:
        raise InvalidInput(
            f"the prompt's longest row is {largest:.3g} times as long as a word of this model, more than "
            f"LETHEON_MAX_PROMPT_NORM, {settings.max_prompt_norm:g}"
        )
