"""The console: pages for people at ``/`` and below ``/console/``, made by the functions that the API's routes call."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from app.console import (
    assets,
    evidence,
    live,
    login,
    new_request,
    overview,
    playground,
    prompts,
    request_page,
    requests,
)
from app.console.access import admit, same_origin
from app.console.pages import problem_page

__all__ = ["admit", "problem_page", "router"]

router = APIRouter(include_in_schema=False, dependencies=[Depends(same_origin)])
# A new request's page before a request's, whose address would take its name for an id.
for _module in (assets, login, overview, requests, new_request, request_page, live, prompts, playground, evidence):
    router.include_router(_module.router)
