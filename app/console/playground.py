"""Try texts: what the bare model says, what is served, and what made the difference.

The bare model's answer to a suppressed text is what was asked to be suppressed (promise 8), so it takes the scope
`scores`, as probabilities do. Which request suppresses a text is for those who may read all of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError

from app import active_set
from app.auth import Caller
from app.bulk_rows import text_rows
from app.compare import Compared, NextToken, a_turn, compare
from app.console.access import ClassifyPage
from app.console.forms import Form, checked
from app.console.pages import HEADERS, render
from app.console.token_text import visible
from app.deps import Service, ServiceDep
from app.errors import DeadlineExceeded, InvalidInput, LetheonError, NotReady, Overloaded, RateLimited
from app.limits import check_count, encode_texts
from app.problems import validation_problem
from app.schemas import ClassifyIn

router = APIRouter()

SHOWN = 50
WITH_TOKENS = 10
"""Texts of a page whose next tokens are shown: that costs the model two passes, and one for each prompt asked."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What a spreadsheet may take for a formula at the beginning of a cell, full-width forms included."""

DECIDED = {
    "base": "No request concerns it.",
    "cleared": "A gate asked its prompt, and the prompt let the answer stand.",
    "abstained": "The prompt of a request answers “unknown”.",
    "certain": "The gate of a request was certain, and decided alone.",
    "guarded": "It is one of the texts of a request, known by its keyed digest.",
}

NO_OTHERS = {
    "base": "No prompt was asked. No request concerns this text, so the bare model's tokens are what is served.",
    "certain": "No prompt was asked. A gate decided alone: the answer is “unknown”, and there are no tokens behind it.",
    "guarded": "No prompt was asked. A keyed digest decided alone: the answer is “unknown”, and there are no tokens.",
}
"""Why there are no tokens behind a prompt, by how a text was answered."""


@dataclass(frozen=True)
class Token:
    """As it is shown: ``width`` of its bar in percent; ``word`` is what it stands for, if it is one of the answers."""

    text: str
    share: str
    width: str
    word: str | None


@dataclass(frozen=True)
class Tokens:
    """``served`` None: ``why`` there are no others. ``requests``: (request id, prompt id), ``prompts``: how many."""

    base: list[Token]
    served: list[Token] | None
    why: str | None
    requests: list[tuple[str, str]]
    prompts: int


@dataclass(frozen=True)
class Shown:
    """One line. ``base``, scores and tokens only with the scope; ``requests``: (request id, prompt id)."""

    text: str
    served: str
    unknown: bool
    base: str | None
    scores: list[tuple[str, str, str]]
    why: str | None
    requests: list[tuple[str, str]]
    tokens: Tokens | None = None


@router.get("/console/playground")
def playground(request: Request, caller: ClassifyPage, service: ServiceDep) -> Any:
    return _page(request, caller, service)


@router.post("/console/playground")
def try_texts(request: Request, caller: ClassifyPage, form: Form, service: ServiceDep) -> Any:
    """``do``: ``show`` the answers, or ``csv``: the same as a file."""
    text = form.one("texts")
    return _handle(request, caller, service, text, form.one("do"))


def _handle(request: Request, caller: Caller, service: Service, text: str, do: str) -> Any:
    try:
        version, shown = _answers(caller, service, text, tokens_of=0 if do == "csv" else WITH_TOKENS)
    except RequestValidationError as error:
        return _page(request, caller, service, text=text, error=validation_problem(error))
    except (InvalidInput, NotReady, Overloaded, DeadlineExceeded, RateLimited) as error:
        return _page(request, caller, service, text=text, error=error)
    if do == "csv":
        headers = {**HEADERS, "Content-Disposition": 'attachment; filename="answers.csv"'}
        content = as_csv(shown, service.serving.labels, version, with_base=caller.may("scores"))
        return Response(content, media_type="text/csv; charset=utf-8", headers=headers)
    return _page(request, caller, service, text=text, version=version, shown=shown)


def _answers(caller: Caller, service: Service, text: str, *, tokens_of: int) -> tuple[int, list[Shown]]:
    """Raises what ``/classify`` raises."""
    lines = io.BytesIO(text.encode("utf-8", "surrogatepass"))
    texts = [row.text or "" for row in text_rows(iter(enumerate(lines, start=1)), lambda: 0)]
    body = checked(ClassifyIn, {"texts": texts})
    assert body.texts is not None
    check_count("texts", len(body.texts), service.settings.max_classify_texts)
    scores = caller.may("scores")
    service.rates.take_texts(caller.key_id, caller.limits, len(body.texts))
    with a_turn():
        encoded = encode_texts(service.serving, [(f"texts[{i}]", one) for i, one in enumerate(body.texts)])
        version, found = compare(service.serving, service.settings, encoded, tokens_of=tokens_of if scores else 0)
    ids = sorted({prompt for one in found for prompt in one.prompts}) if caller.may("auditor", "admin") else []
    with service.sessions() as session:
        requests = {row.id: row.request_id for row in active_set.read_records(session, ids)}
    return version, [_shown(one, t, requests, scores=scores) for t, one in zip(body.texts, found, strict=True)]


def _shown(found: Compared, text: str, requests: dict[str, str], *, scores: bool) -> Shown:
    base, served = found.base, found.served
    return Shown(
        text=text,
        served=served.label,
        unknown=served.abstained,
        base=base.label if scores else None,
        scores=_scores(found) if scores else [],
        # That a gate asked and let it pass tells of the subject, so it goes with the rest.
        why=DECIDED[found.decided] if scores else None,
        requests=[(requests[p], p) for p in found.prompts if p in requests],
        tokens=_tokens(found, requests) if scores else None,
    )


def _scores(found: Compared) -> list[tuple[str, str, str]]:
    base, served = found.base.probabilities, found.served.probabilities
    return [(label, share(base[label]), share(served[label])) for label in base]


def _tokens(found: Compared, requests: dict[str, str]) -> Tokens | None:
    if found.tokens is None:
        return None
    served, prompts = found.tokens.served, found.tokens.prompts
    return Tokens(
        base=[_token(one) for one in found.tokens.base],
        served=None if served is None else [_token(one) for one in served],
        why=NO_OTHERS.get(found.decided) if served is None else None,
        requests=[(requests[p], p) for p in prompts if p in requests],
        prompts=len(prompts),
    )


def _token(found: NextToken) -> Token:
    return Token(visible(found.text, found.id), share(found.probability), f"{100 * found.probability:.2f}", found.word)


def share(probability: float) -> str:
    """In both tables alike: one digit, and neither none nor all where it is nearly so."""
    if 0 < probability < 0.001:
        return "<0.1 %"
    if 0.999 < probability < 1:
        return ">99.9 %"
    return f"{100 * probability:.1f} %" if 0 < probability < 1 else f"{100 * probability:.0f} %"


def as_csv(shown: Sequence[Shown], labels: Sequence[str], version: int, *, with_base: bool) -> str:
    """A header and a line for each text; no cell is a formula."""
    out = io.StringIO()
    writer = csv.writer(out, quoting=csv.QUOTE_ALL)
    writer.writerow(["text", "answer", *(["base_answer", "decided_by"] if with_base else []), "active_set_version"])
    for one in shown:
        beside = [one.base, one.why] if with_base else []
        writer.writerow([_cell(str(cell)) for cell in (one.text, one.served, *beside, version)])
    return out.getvalue()


def _cell(value: str) -> str:
    return f"'{value}" if value.startswith(_FORMULA) else value


def _page(
    request: Request,
    caller: Caller,
    service: Service,
    *,
    text: str = "",
    version: int | None = None,
    shown: Sequence[Shown] = (),
    error: LetheonError | None = None,
) -> Any:
    return render(
        request.scope,
        "playground.html",
        caller=caller,
        status=200 if error is None else error.status,
        text=text,
        version=version,
        shown=shown[:SHOWN],
        count=len(shown),
        unknown=sum(one.unknown for one in shown),
        changed=sum(one.base is not None and one.base != one.served for one in shown),
        error=error,
        errors=error.extra.get("errors", []) if error is not None else [],
        scores=caller.may("scores"),
        with_tokens=WITH_TOKENS,
        labels=service.serving.labels,
        reads_prompts=caller.may("auditor", "admin"),
        limits={"texts": service.settings.max_classify_texts, "tokens": service.serving.max_text_tokens},
    )
