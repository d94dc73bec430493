"""Mode ``concatenate``: the checks of a stack, before a prompt joins it and after one left it.

A prompt is trained behind those in force, so taking an earlier one out changes what the later ones do. The API revokes
at once, since that is what was asked for; the worker then checks what remains and records what it found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from sqlalchemy.orm import Session, sessionmaker

from app import active_set, set_history
from app.settings import Settings
from app.stack import Stack, StackReader
from app.vault import Vault
from models.evaluation import CheckReport, check_prompts
from models.examples import Example
from models.llm import FrozenLLM
from models.soft_prompt import SoftPrompt
from worker.knobs import check_limits

log = logging.getLogger("letheon.worker")


def check_stack(
    llm: FrozenLLM,
    settings: Settings,
    prompts: Sequence[SoftPrompt],
    forget: Sequence[Example],
    retain: Sequence[Example],
    canaries: Sequence[Sequence[str]],
) -> CheckReport:
    """The figures of a stack. Raises TextTooLong, DatasetError."""
    return check_prompts(
        llm,
        prompts,
        forget,
        retain,
        max_retain_rows=settings.check_retain_rows,
        seed=settings.seed,
        limits=check_limits(settings),
        canaries=canaries,
    )


def open_all_canaries(session: Session, *, vault: Vault, stack: Stack) -> list[list[str]]:
    """Of every request in force that has some. Raises VaultError."""
    rows = active_set.read_prompts(session, [member.id for member in stack.members])
    found = [active_set.open_canaries(vault, row) for row in rows if row.wrapped_key is not None]
    return [texts for texts in found if texts]


def recheck(
    sessions: sessionmaker[Session],
    settings: Settings,
    vault: Vault,
    llm: FrozenLLM,
    retain: Callable[[], Sequence[Example]],
) -> bool:
    """Check the set in force where nobody has yet, and record what was found; False when there is nothing to do.

    Raises what reading the set raises.
    """
    with sessions() as session:
        view = active_set.read_active_set(session)
        if set_history.get_version(session, view.version).checks is not None:
            return False
        stack = StackReader(vault, fingerprint=llm.fingerprint, mode=settings.mode).read(session)
        canaries = open_all_canaries(session, vault=vault, stack=stack)
    if not stack.prompts or stack.view != view:
        return False
    report = check_stack(llm, settings, stack.prompts, (), retain(), canaries)
    with sessions.begin() as session:
        set_history.save_checks(session, view.version, report.as_dict())
    said = "passes" if report.passed else "fails: " + "; ".join(report.violations)
    log.log(logging.INFO if report.passed else logging.WARNING, "active set %d: %s", view.version, said)
    return True
