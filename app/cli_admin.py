"""``letheon prompts | active-sets``: what an admin asks of a running server over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from app.cli_output import CommandGroup, JsonOption, emit, note, print_table
from app.cli_remote import make_client
from app.errors import InvalidInput
from letheon_client import Letheon
from letheon_client.types import PromptState, RevokeCode

prompts = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Trained soft prompts (admin).")
active_sets = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Active sets: history and roll-back.")


@prompts.command("list")
def list_prompts(
    state: Annotated[PromptState | None, typer.Option()] = None,
    limit: Annotated[int, typer.Option(min=1, max=200)] = 50,
    cursor: Annotated[str | None, typer.Option(help="next_cursor of the page before.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prompts, newest first."""
    with make_client() as client:
        page = client.list_prompts(limit=limit, cursor=cursor, state=state)
    if as_json:
        emit(page)
        return
    rows = [
        (p["id"], p["request_id"], p["state"], p["num_virtual_tokens"], p["activated_at"][:19], p["revoke_reason"])
        for p in page["items"]
    ]
    print_table(("id", "request", "state", "tokens", "activated (UTC)", "revoked because"), rows)
    if page["next_cursor"]:
        note(f"more: --cursor {page['next_cursor']}")


@prompts.command("revoke")
def revoke(
    prompt_id: str,
    reason: Annotated[str, typer.Option(help="Why; goes into the record.")],
    code: Annotated[RevokeCode, typer.Option()] = "other",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take a prompt out of force. This un-forgets: the old behaviour comes back on every replica.

    Where the server wants two persons, the first one's command only asks; another admin's, with a key of its own,
    carries it out.
    """
    if not yes:
        typer.confirm(f"Revoke {prompt_id}? What it made the model forget comes back.", abort=True, err=True)
    with make_client() as client:
        prompt = client.revoke(prompt_id, reason=reason, code=code)
    if as_json:
        emit(prompt)
    else:
        revoked_at = prompt["revoked_at"] or ""
        print_table(("id", "state", "revoked (UTC)"), [(prompt["id"], prompt["state"], revoked_at[:19])])
    if prompt["state"] != "revoked":
        note(f"asked for, and still {prompt['state']}: another admin has to run this command with a key of their own")


@prompts.command("withdraw-revoke")
def withdraw_revoke(prompt_id: str, as_json: JsonOption = False) -> None:
    """Take back a revoke that was asked for and that nobody has agreed to."""
    with make_client() as client:
        prompt = client.withdraw_revoke(prompt_id)
    emit(prompt) if as_json else print_table(("id", "state"), [(prompt["id"], prompt["state"])])


@active_sets.command("list")
def list_active_sets(
    limit: Annotated[int, typer.Option(min=1, max=200)] = 20,
    before: Annotated[int | None, typer.Option(help="Versions below this one.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The active set in force, first, and those before it."""
    with make_client() as client:
        page = client.list_active_sets(limit=limit, before=before)
    if as_json:
        emit(page)
        return
    rows = [(s["version"], s["size"], s["digest"][:12], s["created_at"][:19], s["reason"]) for s in page["items"]]
    print_table(("version", "prompts", "digest", "since (UTC)", "restored because"), rows)
    if page["next_before"] is not None:
        note(f"more: --before {page['next_before']}")


@active_sets.command("restore")
def restore(
    version: Annotated[int, typer.Argument(min=0)],
    reason: Annotated[str, typer.Option(help="Why; goes into the record.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Put an earlier active set in force. What was forgotten since comes back, until you restore again."""
    if not yes:
        typer.confirm(f"Restore version {version}? Prompts that came since are suspended.", abort=True, err=True)
    with make_client() as client:
        found = client.restore(version, reason=reason)
    if as_json:
        emit(found)
    else:
        print_table(("version", "prompts", "digest"), [(found["version"], found["size"], found["digest"][:12])])


@active_sets.command("rollback")
def rollback(
    reason: Annotated[str, typer.Option(help="Why; goes into the record.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Restore the newest version that differs from the one in force. Done twice, it brings back what it took away."""
    with make_client() as client:
        version = _earlier_version(client)
    if version is None:
        raise InvalidInput("there is no earlier version that differs from the one in force")
    restore(version, reason=reason, yes=yes, as_json=as_json)


def _earlier_version(client: Letheon) -> int | None:
    """The newest version of the active set that differs from the one in force."""
    versions = client.iter_active_sets()
    current = next(versions)["digest"]
    return next((entry["version"] for entry in versions if entry["digest"] != current), None)
