"""``letheon prompts export | import``: out of a running server, and into the database that is configured here.

An import is no route of the API: nobody sends a tensor to this server. Whoever runs this command, on its machine and
with its master key, also shows an admin's key: the log names it, and where two have to agree the second is another.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import typer

from app import keys, terms, zip_files
from app.cli_local import local_sessions
from app.cli_output import JsonOption, emit, note
from app.cli_remote import make_client, read_texts
from app.defaults import load_arguments
from app.errors import InvalidInput
from app.lifecycle import ForgetText
from app.settings import get_settings
from app.tables import utcnow
from app.vault import Vault

EXPORTED = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "letheon.json",
    "prompt.safetensors",
    "prompt_embeds.py",
    "README.md",
)
"""Names of files that an export may put into the folder, whatever a server sends."""
_MAX_FILE = 64 * 2**20
_SLACK = 2**20  # of a zip file, beside the files that are looked for


def export(
    prompt_id: str,
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder: made, or there and without these files.")],
    kind: Annotated[
        Literal["peft", "safetensors", "vllm"], typer.Option("--format", help="peft, safetensors or vllm.")
    ] = "peft",
    as_json: JsonOption = False,
) -> None:
    """Write a prompt in clear into a folder that only you can read (scope admin, where the server allows it).

    It is personal data, and it is yours to delete when the prompt is revoked. Its gate is not exported.
    """
    with make_client() as client:
        data = client.export_prompt(prompt_id, kind)
    if kind == "safetensors":
        files: Mapping[str, bytes] = {"prompt.safetensors": data}
    else:
        files = zip_files.unpack(data, dict.fromkeys(EXPORTED, _MAX_FILE))
    if not files:
        raise InvalidInput("the answer holds no prompt: is LETHEON_URL right?")
    out.mkdir(mode=0o700, parents=True, exist_ok=True)
    for name, content in files.items():
        descriptor = os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    paths = [str(out / name) for name in files]
    emit({"prompt_id": prompt_id, "format": kind, "files": paths}) if as_json else note("\n".join(paths))


def import_adapter(
    source: Annotated[Path, typer.Argument(metavar="ADAPTER", help="Folder or zip of a PEFT prompt-tuning adapter.")],
    file: Annotated[
        Path,
        typer.Option("--file", "-f", help="The texts that it is to forget: JSONL or plain lines; - is stdin."),
    ],
    reason: Annotated[str | None, typer.Option(help="Kept with the request; no personal data here.")] = None,
    require_approval: Annotated[
        bool, typer.Option("--require-approval", help="Another person's key has to agree before it is in force.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a request of a prompt that was trained elsewhere, in the database that is configured here.

    A worker fits its gate on the texts and checks it like any other: only a prompt that passes comes into force, and
    one that does not ends as failed. LETHEON_API_KEY must be an admin's key of this database.
    """
    settings = get_settings()
    items = [
        ForgetText(item) if isinstance(item, str) else ForgetText(item["text"], item.get("label"))
        for item in read_texts(file)
    ]
    texts = list(dict.fromkeys(items))
    with local_sessions(settings) as sessions:
        with sessions() as session:
            key = keys.authenticate(session, os.environ.get("LETHEON_API_KEY", "").strip())
            keys.require(key.scopes, "admin")
            actor = key.id
        from app import interop  # torch takes seconds to import: only the commands that need it
        from models.interop import max_bytes, read_peft
        from models.llm import FrozenLLM

        llm = FrozenLLM.load(**load_arguments(settings))
        files = read_files(source, max_bytes(llm.hidden_size))
        prompt = read_peft(files, fingerprint=llm.fingerprint, hidden_size=llm.hidden_size)
        agreed = terms.agree(
            received_at=None,
            expires_at=None,
            approval_required=require_approval or settings.require_approval,
            months=settings.deadline_months,
            now=utcnow(),
        )
        vault = Vault.from_settings(settings)
        try:
            with sessions.begin() as session:
                vault.adopt(session)
                request = interop.import_prompt(
                    session, vault, llm, settings, prompt, texts, actor=actor, reason=reason, terms=agreed
                )
                made = {"request_id": request.id, "prompt_digest": prompt.digest, "num_texts": len(texts)}
        finally:
            vault.close()
    if as_json:
        emit(made)
    else:
        note(f"{made['request_id']} waits for a worker: letheon requests show {made['request_id']} --wait")


def read_files(source: Path, limits: Mapping[str, int]) -> dict[str, bytes]:
    """Of a folder or a zip file, the files of these names, no more of each than its limit. Raises InvalidInput."""
    if not source.is_dir():
        most = sum(limits.values()) + _SLACK
        with source.open("rb") as archive:
            data = archive.read(most + 1)
        if len(data) > most:
            raise InvalidInput(f"{source} is larger than an adapter of this model can be, {most} bytes")
        return zip_files.unpack(data, limits)
    found = {}
    for name, limit in limits.items():
        path = source / name
        if not path.is_file():
            continue
        with path.open("rb") as one:
            found[name] = one.read(limit + 1)
        if len(found[name]) > limit:
            raise InvalidInput(f"{path} has more than {limit} bytes")
    return found
