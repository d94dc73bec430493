"""What pages load, from memory: a name holds a hash of its bytes, so a browser keeps it for good."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from app.errors import NotFound

router = APIRouter()

_TYPES = {"css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_NAMES = ("console.css", "console.js", "htmx.min.js", "sse.min.js", "icon.svg")


def _load() -> tuple[dict[str, str], dict[str, tuple[bytes, str]]]:
    hashed, contents = {}, {}
    for name in _NAMES:
        data = files("app.console").joinpath("static", name).read_bytes()
        stem, _, ending = name.rpartition(".")
        hashed[name] = f"{stem}.{hashlib.sha256(data).hexdigest()[:12]}.{ending}"
        contents[hashed[name]] = (data, _TYPES[ending])
    return hashed, contents


_HASHED, _CONTENTS = _load()


def asset(name: str) -> str:
    """Its address, as pages write addresses."""
    return f"console/static/{_HASHED[name]}"


@router.get("/console/static/{name}")
async def static_file(name: str) -> Any:
    """Needs no session: the login page loads them. Raises NotFound."""
    if name not in _CONTENTS:
        raise NotFound("no such file")
    data, media_type = _CONTENTS[name]
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(data, media_type=media_type, headers=headers)
