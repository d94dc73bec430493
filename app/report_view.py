"""What the page and the PDF of a report both show: rows of text and pictures, made of the report alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from app.charts import Bar, Series, bar_chart, line_chart, percent
from app.report import AREAS, FAILURES, interval, moment
from app.signing import canonical
from app.words import STATES

Rows = list[tuple[str, str]]
NONE = "–"
PICTURE_CLASSES = 8  # of more labels than these the picture shows the first; the table has them all

_COUNTS = {
    "unseen_rows": "The request's own texts that were left out in turn, for the estimates",
    "check_rows": "Other texts that the gates were checked on",
    "retain_rows": "Other texts that the answers were checked on",
    "neighbour_rows": "Of the other texts, the nearest to the request's",
    "held_out_rows": "Texts that the model was never trained on, for the answers and the membership attack",
    "prompt_norm": "Largest vector of the prompt, relative to a word's",
    "prompt_norm_mean": "Mean vector of the prompt, in the same measure",
    "lost_canaries": "Earlier requests that would no longer hold",
    "active_requests": "Requests in force, this one included",
    "steps": "Steps of training",
    "attempt": "Attempt of a worker",
}
_CURVES = {"loss": "all", "forget_loss": "forget", "retain_loss": "retain", "kl_loss": "distance to the bare model"}


@dataclass(frozen=True)
class FigureRow:
    """A row of the table of figures, every cell as it is shown."""

    words: str
    name: str
    before: str
    before_interval: str
    after: str
    after_interval: str
    rows: str
    limit: str
    kept: str


@dataclass(frozen=True)
class View:
    """The parts of a report, in the order in which they stand."""

    title: str
    subtitle: str
    summary: list[str]
    asked: Rows
    history: list[tuple[str, str, str]]  # when, what, entry of the audit log
    figures: list[FigureRow]
    counts: Rows
    notes: list[str]
    pictures: list[str]  # SVG
    meaning: list[str]
    technical: Rows
    signature: Rows
    verify: list[str]
    receipt: str  # the file that the signature is of, without a line feed at its end
    file_name: str


def view(report: Mapping[str, Any]) -> View:
    signed, receipt = report["receipt"], report["receipt"]["receipt"]
    text = canonical(signed).decode()
    key, file_name = receipt["key"], f"receipt-{report['request_id']}.json"
    return View(
        title="Report on an unlearning request",
        subtitle=f"{report['request_id']} · {_state(report['state'])} · as of {moment(report['as_of'])}",
        summary=report["summary"],
        asked=_asked(receipt),
        history=[(moment(e["at"]), e["what"], f"{e['seq']}: {e['hash']}") for e in report["history"]],
        figures=[_figure_row(figure, receipt["checks"]) for figure in report["figures"]],
        counts=_counts(receipt["checks"]),
        notes=[*_violations(receipt["checks"]), *(f"{said[:1].upper()}{said[1:]}." for said in report["warnings"])],
        pictures=list(_pictures(report)),
        meaning=report["meaning"],
        technical=_technical(receipt),
        signature=[
            ("Signed by", f"the key {key['id']} of this deployment ({key['algorithm']})"),
            ("Public key", key["public_key"]),
            ("Signature", signed["signature"]),
            ("SHA-256 of the receipt", hashlib.sha256(text.encode()).hexdigest()),
        ],
        verify=[
            "What is signed is the receipt that this report holds. The report says the same in other words; only the "
            "curve of the training and the remarks are not in the receipt. Where the two differ, the receipt counts.",
            f"To verify it, take the receipt out of the report as {file_name} and run: "
            f"letheon receipt verify {file_name} --public-key KEY. Take KEY from where it was published or kept, and "
            "not from this report: whoever forges one can sign it with a key of his own.",
            "Entries of the audit log can be looked up, by number and hash, in an export of the log (letheon audit "
            "verify).",
        ],
        receipt=text,
        file_name=file_name,
    )


def _asked(receipt: Mapping[str, Any]) -> Rows:
    request, failure, revoked = receipt["request"], receipt["failure"], receipt["revocation"]
    rows = [
        ("Request", request["id"]),
        ("State", _state(request["state"])),
        ("Texts", str(request["num_texts"])),
        ("Asked for by", request["asked_by"] or NONE),
        ("Received from the person", _when(request["received_at"])),
        ("Stored", _when(request["created_at"])),
        ("Due", _when(request["due_at"])),
        ("Second person", _approval(request)),
        ("In force since", _when(request["active_at"])),
        ("Ends by itself", _when(request["expires_at"])),
    ]
    if not request["active_at"]:  # of one that came into force it is the same moment once more
        rows.append(("Ended", _when(request["finished_at"])))
    if failure:
        said = FAILURES.get(failure["code"])
        rows.append(("Failure", f"{said} ({failure['code']})" if said else failure["code"]))
    if revoked:
        rows.append(("Revoked", f"{_when(revoked['at'])}, by {revoked['by']}, reason code {revoked['code']}"))
    return [*rows, *(_flat("Option", request["options"]) if request["options"] else [("Options", "none")])]


def _state(state: str) -> str:
    """As the console has it, and as the API and the command line do."""
    return f"{STATES.get(state, state)} ({state})"


def _approval(request: Mapping[str, Any]) -> str:
    if not request["approval_required"]:
        return "not needed"
    if not request["approved_at"]:
        return "needed, and not given"
    return f"agreed on {moment(request['approved_at'])} ({request['approved_by']})"


def _figure_row(figure: Mapping[str, Any], checks: Mapping[str, Any]) -> FigureRow:
    if figure["name"] in AREAS:
        return _area_row(figure, checks["counts"].get("held_out_rows"))
    before, after, limit = figure["before"], figure["after"], figure["limit"]
    counted = {rate["rows"] for rate in (before, after) if rate and rate["rows"] is not None}
    kept = {True: "yes", False: "no", None: NONE}[figure["kept"]]
    return FigureRow(
        words=figure["words"],
        name=figure["name"],
        before=percent(before["rate"]) if before else NONE,
        before_interval=_interval(before),
        after=percent(after["rate"]) if after else NONE,
        after_interval=_interval(after),
        rows=", ".join(str(rows) for rows in sorted(counted)) or NONE,
        limit=f"at {'least' if limit['at_least'] else 'most'} {percent(limit['rate'])}" if limit else NONE,
        kept=kept if limit else NONE,
    )


def _area_row(figure: Mapping[str, Any], held_out: int | None) -> FigureRow:
    """``held_out``: how many texts those of the request were told from; None: others, which no receipt counts."""

    def said(area: Mapping[str, Any] | None) -> str:
        return f"{area['rate']:.3f} ({area['low']:.3f} to {area['high']:.3f})" if area else NONE

    members = next(area["rows"] for area in (figure["after"], figure["before"]) if area)
    return FigureRow(
        words=figure["words"],
        name=figure["name"],
        before=said(figure["before"]),
        before_interval="",
        after=said(figure["after"]),
        after_interval="",
        rows=f"{members} of the request, {f'{held_out} held out' if held_out else 'and others'}",
        limit=NONE,
        kept=NONE,
    )


def _interval(rate: Mapping[str, Any] | None) -> str:
    if not rate:
        return ""
    return "estimate" if rate["low"] is None else interval(rate).removeprefix("95 % interval ")


def _counts(checks: Mapping[str, Any] | None) -> Rows:
    if not checks:
        return []
    counts = checks["counts"]
    names = sorted(counts, key=lambda name: [*_COUNTS, name].index(name))
    rows = [(_COUNTS.get(name, name), _number(counts[name])) for name in names]
    return [*rows, *_flat("Limit", checks["limits"] or {})]


def _violations(checks: Mapping[str, Any] | None) -> list[str]:
    return [f"Not kept: {violation}." for violation in checks["violations"]] if checks else []


def _technical(receipt: Mapping[str, Any]) -> Rows:
    parts = {
        "Digest of the set": receipt["request"]["set_digest"],
        "Model": receipt["model"],
        "Prompt": receipt["prompt"],
        "Active set": receipt["active_set"],
    }
    rows = [row for name, value in parts.items() for row in _flat(name, value)]
    for number, tried in enumerate(receipt["earlier_tries"], start=1):
        rows += _flat(f"Earlier try {number}", tried)
    return rows


def _flat(name: str, value: Any) -> Rows:
    """A JSON value as rows: names of what is inside are put behind a dot."""
    if isinstance(value, dict):
        return [row for inner, one in value.items() for row in _flat(f"{name}: {inner}", one)] or [(name, NONE)]
    if isinstance(value, list) and any(isinstance(one, dict | list) for one in value):
        return [row for number, one in enumerate(value, start=1) for row in _flat(f"{name} {number}", one)]
    if isinstance(value, list):
        return [(name, ", ".join(_number(one) for one in value) or NONE)]
    return [(name, _number(value))]


def _number(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str) and value.isprintable():
        return value
    return json.dumps(value, ensure_ascii=False)  # a template has line feeds, which are to be seen


def _when(iso: str | None) -> str:
    return moment(iso) if iso else NONE


def _pictures(report: Mapping[str, Any]) -> Iterator[str]:
    classes = [f["name"] for f in report["figures"] if f["name"].startswith("class ")][PICTURE_CLASSES:]
    shown = [figure for figure in report["figures"] if figure["name"] not in (*classes, *AREAS)]
    if shown:
        yield bar_chart([_bar(figure) for figure in shown], title="Before and after, with 95 % intervals and limits")
    curve = report["curve"]
    if curve:
        series = [
            Series(words, [(point["step"], point[name]) for point in curve if name in point])
            for name, words in _CURVES.items()
        ]
        yield line_chart([one for one in series if one.points], title="Training of the prompt", x="step", y="loss")


def _bar(figure: Mapping[str, Any]) -> Bar:
    before, after, limit = figure["before"], figure["after"], figure["limit"]
    return Bar(
        label=figure["short"],
        before=before and before["rate"],
        after=after and after["rate"],
        low=after and after["low"],
        high=after and after["high"],
        limit=limit and limit["rate"],
        at_least=not limit or limit["at_least"],
    )
