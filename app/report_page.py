"""A report as one HTML file: no script, nothing from elsewhere, and readable when it is printed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from app import charts
from app.report_view import view

_TEMPLATES = Path(__file__).parent / "templates"
_STYLE = (_TEMPLATES / "report.css").read_text(encoding="utf-8") + charts.STYLESHEET
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
_IN_FILE = f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; form-action 'none'"
POLICY = f"{_IN_FILE}; frame-ancestors 'none'; sandbox allow-downloads"
"""For the answer that carries the page: its own style, by its hash, and no more. The file says the same of itself, but
for what a file cannot say."""


def render(report: Mapping[str, Any]) -> bytes:
    """The page of a report of ``app.report``, in UTF-8; the same report always gives the same bytes."""
    shown = view(report)
    page = _ENVIRONMENT.get_template("report.html").render(
        report=report,
        view=shown,
        pictures=[Markup(picture) for picture in shown.pictures],  # noqa: S704  # app.charts escapes
        receipt_base64=base64.b64encode(shown.receipt.encode()).decode(),
        style=Markup(_STYLE),  # noqa: S704  # our own file
        policy=_IN_FILE,
    )
    return page.encode()


def _code(sentence: str) -> Markup:
    """What stands between backticks, as code."""
    parts = [escape(part) for part in sentence.split("`")]
    return Markup("").join(Markup("<code>{}</code>").format(part) if i % 2 else part for i, part in enumerate(parts))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["code"] = _code
    return environment


_ENVIRONMENT = _environment()
