"""``letheon webhooks``: be told of state changes."""

from __future__ import annotations

from typing import Annotated, cast

import typer

from app.cli_output import CommandGroup, JsonOption, emit, note, print_table
from app.cli_remote import make_client
from letheon_client.types import Delivery, DeliveryPage, DeliveryState, RequestState, WebhookPage

webhooks = typer.Typer(cls=CommandGroup, no_args_is_help=True, help="Signed messages about state changes.")

LimitOption = Annotated[int, typer.Option(min=1, max=200)]
CursorOption = Annotated[str | None, typer.Option(help="next_cursor of the page before.")]


@webhooks.command("create")
def create(
    url: Annotated[str, typer.Argument(help="Where to; https:// and public, unless the server allows others.")],
    state: Annotated[list[str] | None, typer.Option(help="Tell of this state; repeatable. Default: of all.")] = None,
    all_requests: Annotated[
        bool, typer.Option("--all-requests", help="Of everybody's requests (scope `admin`, `auditor` or `approve`).")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Make a webhook. Its signing secret is printed once, on stdout."""
    with make_client() as client:
        made = client.create_webhook(
            url,
            states=cast(list[RequestState], state or []),  # the server names those that there are
            all_requests=all_requests,
        )
    if as_json:
        emit(made)
    else:
        note(f"{made['id']}: {', '.join(made['states']) or 'all states'}. Its signing secret, shown only now:")
        typer.echo(made["secret"])


@webhooks.command("list")
def list_webhooks(limit: LimitOption = 50, cursor: CursorOption = None, as_json: JsonOption = False) -> None:
    """Webhooks, newest first, disabled ones included."""
    with make_client() as client:
        page = client.list_webhooks(limit=limit, cursor=cursor)
    if as_json:
        emit(page)
        return
    rows = [
        (
            hook["id"],
            hook["url"] or f"(of {hook['api_key_id']})",
            ", ".join(hook["states"]) or "all",
            "everybody's" if hook["all_requests"] else "own",
            hook["created_at"][:19],
            (hook["disabled_at"] or "")[:19],
        )
        for hook in page["items"]
    ]
    print_table(("id", "url", "states", "requests", "created (UTC)", "disabled (UTC)"), rows)
    _more(page)


@webhooks.command("disable")
def disable(webhook_id: str, as_json: JsonOption = False) -> None:
    """End a webhook, for good."""
    with make_client() as client:
        found = client.disable_webhook(webhook_id)
    if as_json:
        emit(found)
    else:
        note(f"{found['id']} is disabled")


@webhooks.command("deliveries")
def deliveries(
    webhook_id: str,
    state: Annotated[DeliveryState | None, typer.Option()] = None,
    limit: LimitOption = 50,
    cursor: CursorOption = None,
    as_json: JsonOption = False,
) -> None:
    """What was sent and how that went, newest first."""
    with make_client() as client:
        page = client.list_deliveries(webhook_id, limit=limit, cursor=cursor, state=state)
    if as_json:
        emit(page)
        return
    _print_deliveries(page["items"])
    _more(page)


@webhooks.command("redeliver")
def redeliver(webhook_id: str, delivery_id: str, as_json: JsonOption = False) -> None:
    """Send a message once more, now."""
    with make_client() as client:
        found = client.redeliver(webhook_id, delivery_id)
    emit(found) if as_json else _print_deliveries([found])


@webhooks.command("test")
def ping(webhook_id: str, as_json: JsonOption = False) -> None:
    """Send a ping. `letheon webhooks deliveries` says whether it arrived."""
    with make_client() as client:
        found = client.ping_webhook(webhook_id)
    emit(found) if as_json else _print_deliveries([found])


def _print_deliveries(items: list[Delivery]) -> None:
    rows = [
        (
            d["id"],
            d["payload"]["type"],
            d["state"],
            d["attempts"],
            d["last_status"],
            d["last_error"],
            d["created_at"][:19],
        )
        for d in items
    ]
    print_table(("id", "type", "state", "attempts", "status", "error", "created (UTC)"), rows)


def _more(page: WebhookPage | DeliveryPage) -> None:
    if page["next_cursor"]:
        note(f"more: --cursor {page['next_cursor']}")
