"""From a template and values to a page: addresses, times and figures as people read them.

Addresses in templates are relative to ``<base>``, which is where the application is mounted, so a proxy may serve it
below a path of its own. Nothing is inline: the policy allows no style and no script that is not a file of ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.types import Scope

from app.auth import Caller, known_caller
from app.charts import percent
from app.console.access import LOGIN, PREFIX, is_console, path_of
from app.console.assets import asset
from app.errors import LetheonError, Unauthenticated
from app.keys import READS_ALL
from app.security_headers import CONSOLE_POLICY
from app.tables import utcnow

HEADERS = {
    "Content-Security-Policy": CONSOLE_POLICY,
    # With no-referrer a browser would send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
}
_NEXT = re.compile(r"console/[A-Za-z0-9_/-]{1,100}")
_NAV = (
    ("", "Overview", ()),
    ("console/requests", "Requests", ("requests", *READS_ALL)),
    ("console/prompts", "Prompts", ("auditor", "admin")),
    ("console/playground", "Playground", ("classify",)),
    ("console/evidence", "Evidence", ("auditor", "admin")),
)


def moment(at: datetime | None) -> Markup:
    """``28 Nov 2026, 05:15`` in UTC, machine-readable too."""
    if at is None:
        return Markup('<span class="none">–</span>')
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.isoformat(timespec="seconds"), f"{at:%Y-%m-%d %H:%M:%S} UTC", f"{at.day} {at:%b %Y, %H:%M}"
    )


def day(at: datetime) -> Markup:
    """``28 Nov 2026``: where the hour is of no matter; it is in the title."""
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        at.isoformat(timespec="seconds"), f"{at:%Y-%m-%d %H:%M:%S} UTC", f"{at.day} {at:%b %Y}"
    )


def span(seconds: float) -> str:
    """A length of time in words, one unit: ``3 min``, ``2 days``, which from a day and a half is nearer than hours."""
    for least, size, name in ((129_600, 86_400, "days"), (3600, 3600, "h"), (60, 60, "min")):
        if seconds >= least:
            return f"{round(seconds / size)} {name}"
    return f"{max(0, round(seconds))} s"


def relative(at: datetime) -> str:
    """``in 12 days``, ``3 min ago``."""
    left = (at - utcnow()).total_seconds()
    return f"in {span(left)}" if left > 0 else f"{span(-left)} ago"


def actor(name: str) -> Markup:
    """Who did it: a key by its last digits, a worker as such. Its host, process and lease are in the title."""
    shown = short(name) if name.startswith("key_") else "worker" if ":" in name else name
    return Markup('<span class="mono" title="{}">{}</span>').format(name, shown)


def short(digest: str) -> str:
    """The first digits of a digest or the last of an id, which is where ids differ."""
    return f"{digest[:4]}…{digest[-8:]}" if "_" in digest else f"{digest[:12]}…"


_env = Environment(
    loader=PackageLoader("app.console"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_env.filters |= {"moment": moment, "day": day, "relative": relative, "span": span}
_env.filters |= {"percent": percent, "short": short, "actor": actor}
_env.globals |= {"asset": asset}


def fragment(name: str, values: Mapping[str, Any]) -> str:
    """A template alone, for a place in a page that is there already."""
    return _env.get_template(name).render(values)


def render(
    scope: Scope, name: str, *, caller: Caller | None, status: int = 200, headers: Mapping[str, str] = {}, **values: Any
) -> HTMLResponse:
    """A whole page."""
    path = path_of(scope)
    query = scope.get("query_string", b"").decode("latin-1")
    page = {
        "base": "../" * (path.count("/") - 1) or "./",
        "here": path[1:] + (f"?{query}" if query else ""),
        "caller": caller,
        "nav": [
            (address, title, path == f"/{address}" or bool(address and path.startswith(f"/{address}/")))
            for address, title, scopes in _NAV
            if caller is not None and (not scopes or caller.may(*scopes))
        ],
    }
    return HTMLResponse(fragment(name, page | values), status_code=status, headers={**HEADERS, **headers})


def see_other(scope: Scope, address: str) -> Response:
    """After a form was carried out: go and look. ``address`` as in templates."""
    up = "../" * (path_of(scope).count("/") - 1) or "./"
    return RedirectResponse(up + address, status_code=303)


def login_address(next_page: str) -> str:
    return LOGIN[1:] + (f"?next={quote(next_page, safe='/')}" if _NEXT.fullmatch(next_page) else "")


def safe_next(next_page: str) -> str:
    """Where to go after the login: a page of this console and nothing else."""
    return next_page if _NEXT.fullmatch(next_page) else ""


def problem_page(
    scope: Scope, error: LetheonError, problem: dict[str, Any], headers: dict[str, str]
) -> Response | None:
    """What a person sees of an error (``app.state.problem_page``); None where a program asked."""
    if not is_console(scope) or path_of(scope).startswith(f"{PREFIX}static/"):
        return None
    asked = Request(scope).headers
    if isinstance(error, Unauthenticated) and path_of(scope) != LOGIN:
        return _to_login(scope, asked, {"Connection": headers["Connection"]} if "Connection" in headers else {})
    headers.pop("WWW-Authenticate", None)  # a browser would ask for a password
    return render(
        scope, "error.html", caller=known_caller(scope), status=problem["status"], headers=headers, problem=problem
    )


def _to_login(scope: Scope, asked: Mapping[str, str], kept: Mapping[str, str]) -> Response:
    """``kept``: headers of the refusal, which closes a connection whose body nobody reads."""
    get = scope["method"] == "GET"
    up = "../" * (path_of(scope).count("/") - 1) or "./"
    address = up + login_address(path_of(scope)[1:] if get else "")
    if "hx-request" in asked:
        return Response(status_code=401, headers={**HEADERS, **kept, "HX-Redirect": address})
    if get and asked.get("sec-fetch-site") == "cross-site":
        # Behind a link in an e-mail the browser keeps a strict cookie to itself; asked once more, by our own page, it
        # sends it.
        return render(scope, "again.html", caller=None, headers=kept)
    return RedirectResponse(address, status_code=303, headers={**HEADERS, **kept})
