"""The interactive reference: Swagger UI from this server's own files (package fastapi-offline).

FastAPI's own page loads scripts from another host into a page where API keys are typed, and is blank without a network.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Response
from starlette.responses import HTMLResponse

from app.errors import NotFound
from app.security_headers import DOCS_POLICY

router = APIRouter(include_in_schema=False)

# Addresses are relative: a proxy may serve all of this below a path of its own.
PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Letheon: API reference</title>
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<div id="reference"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""
START = """SwaggerUIBundle({
  url: new URL("openapi.json", document.baseURI).href,
  dom_id: "#reference",
  deepLinking: true,
  persistAuthorization: false,
  validatorUrl: null,
});
"""
_PACKAGED = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


@router.get("/docs")
async def reference() -> Any:
    """The page."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": DOCS_POLICY})


@router.get("/docs/{name}")
def reference_part(name: str) -> Any:
    """What the page loads. Raises NotFound."""
    if name == "start.js":
        return Response(START, media_type="text/javascript")
    if name not in _PACKAGED:
        raise NotFound("no such part of the reference")
    content = files("fastapi_offline").joinpath("static", name).read_bytes()
    return Response(content, media_type=_PACKAGED[name])
