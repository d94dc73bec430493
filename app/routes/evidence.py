"""What a request's checks left to look at: as data, and as two pictures."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response

from app import evidence, evidence_pictures, lifecycle
from app.auth import ReaderCaller
from app.deps import RequestId, ServiceDep
from app.errors import Conflict, Forbidden, InvalidInput, NotFound, RateLimited, Unauthenticated
from app.keys import READS_ALL
from app.problems import problems
from app.schemas_evidence import EvidenceOut

router = APIRouter(
    tags=["unlearn requests"],
    responses=problems(Unauthenticated, Forbidden, InvalidInput, RateLimited, NotFound, Conflict),
)
SVG = "image/svg+xml"
_PICTURE: dict[int | str, dict[str, Any]] = {200: {"content": {SVG: {"schema": {"type": "string"}}}}}


def _read(caller: ReaderCaller, request_id: RequestId, service: ServiceDep) -> dict[str, Any]:
    with service.sessions() as session:
        request = lifecycle.get_request(session, request_id, owner=caller.owner(*READS_ALL))
        return evidence.read(session, service.vault, request)


Document = Annotated[dict[str, Any], Depends(_read)]


@router.get("/unlearn-requests/{request_id}/evidence", response_model=EvidenceOut)
def get_evidence(document: Document) -> Any:
    """The request's texts on a plane and a membership attack on them, before and after. 409 with `why` where there is
    none: before its checks, after a revoke (it is shredded), or when it could not be made."""
    return document


@router.get("/unlearn-requests/{request_id}/evidence/embedding.svg", response_class=Response, responses=_PICTURE)
def get_embedding_picture(document: Document) -> Response:
    """Fig. 1 of the SPUL paper for this request: hidden states by t-SNE, before and after. A picture is no proof."""
    return Response(evidence_pictures.embedding_svg(document), media_type=SVG)


@router.get("/unlearn-requests/{request_id}/evidence/membership.svg", response_class=Response, responses=_PICTURE)
def get_membership_picture(document: Document) -> Response:
    """ROC curves of the membership attack, before and after."""
    return Response(evidence_pictures.membership_svg(document), media_type=SVG)
