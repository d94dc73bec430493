"""A prompt in clear, for whoever may take it out of the service."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from app import interop
from app.auth import AdminCaller
from app.deps import PromptId, ServiceDep
from app.errors import Conflict, ExportsOff, Forbidden, InvalidInput, NotFound, NotReady, RateLimited, Unauthenticated
from app.problems import problems

router = APIRouter(tags=["admin"], responses=problems(Unauthenticated, Forbidden, InvalidInput, RateLimited))

_BYTES = {"schema": {"type": "string", "format": "binary"}}
_OK = {
    "content": {interop.ZIP: _BYTES, interop.TENSOR: _BYTES},
    "headers": {
        "Content-Disposition": {"description": "The file's name.", "schema": {"type": "string"}},
        "Letheon-Prompt-Digest": {
            "description": "Of the prompt's record.",
            "schema": {"type": "string", "pattern": "^[0-9a-f]{64}$"},
        },
        "Letheon-Gate": {
            "description": "`not exported`: here a gate decides which queries the prompt is for, and there it is for "
            "all of them. `none`: it has no gate.",
            "schema": {"type": "string", "enum": ["not exported", "none"]},
        },
    },
}


@router.get(
    "/admin/prompts/{prompt_id}/export",
    response_class=Response,
    responses={200: _OK, **problems(Forbidden, ExportsOff, NotFound, Conflict, NotReady)},
)
def export_prompt(
    caller: AdminCaller,
    prompt_id: PromptId,
    service: ServiceDep,
    kind: Annotated[
        Literal["peft", "safetensors", "vllm"],
        Query(
            alias="format",
            description="`peft`: a zip with an adapter that `PeftModel.from_pretrained` loads. `safetensors`: the "
            "tensor alone. `vllm`: a zip with the tensor and a script that makes `prompt_embeds` of it and a text.",
        ),
    ] = "peft",
) -> Response:
    """The soft prompt in clear, for use outside; 403 unless the operator allows it (`LETHEON_EXPORT_PROMPTS`).

    It is personal data, and no revoke reaches the copy. A gate is not exported: outside, the prompt is for every query
    that it is put before. 409 for a prompt that was revoked, or that is another model's.
    """
    if not service.settings.export_prompts:
        raise ExportsOff("exports are turned off: LETHEON_EXPORT_PROMPTS is not set on this server")
    with service.sessions.begin() as session:  # committed before a byte leaves
        found = interop.export_prompt(
            session,
            service.vault,
            service.serving.llm,
            service.settings,
            prompt_id,
            kind,
            actor=caller.key_id,
        )
    headers = {
        "Content-Disposition": f'attachment; filename="{found.name}"',
        "Letheon-Prompt-Digest": found.digest,
        "Letheon-Gate": found.gate,
    }
    return Response(found.data, media_type=found.media_type, headers=headers)
