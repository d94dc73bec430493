"""``letheon requests submit --dry-run``: what a request would do, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import typer

from app.cli_output import emit, note, percent, print_table
from letheon_client import ForgetText, Letheon, TrainingOptions
from letheon_client.types import DryRun, ForgetSet

SHOWN = 20  # places of texts in one line


def run(client: Letheon, texts: Sequence[str | ForgetText], options: TrainingOptions, *, as_json: bool) -> None:
    """Raises typer.Exit with status 1 where the request would fail."""
    with client:
        report = client.dry_run(texts, options=options)
    if as_json:
        emit(report)
    else:
        print_table(("", "dry run"), rows(report))
        for warning in report["warnings"]:
            note(f"warning: {warning}")
        for obstacle in report["obstacles"]:
            note(f"it would fail: {obstacle['code']}: {obstacle['detail']}")
    if report["obstacles"]:
        raise typer.Exit(1)


def rows(report: DryRun) -> list[tuple[str, object]]:
    """Places count from 1 here."""
    forget, retain, gate, blast = report["forget"], report["retain"], report["gate"], report["blast_radius"]
    found: list[tuple[str, object]] = [
        ("texts", forget["texts"]),
        ("different", forget["different"]),
        ("equal to an earlier one", _places(forget["exact_duplicates"])),
        ("much like an earlier one", _places(forget["near_duplicates"])),
        ("answered `unknown` today", _unknown(forget)),
    ]
    if retain is not None:
        found += [
            ("retain rows", str(retain["rows"])),
            ("retain rows that repeat a text", f"{retain['withheld']} ({percent(retain['withheld_share'])})"),
            ("texts that such a row repeats", _places(retain["texts"])),
            ("retain rows much like a text", retain["near_rows"]),
        ]
    if gate is not None:
        found += [
            ("subjects", gate["subjects"]),
            ("its gate reaches, of the texts", percent(gate["own_recall"])),
            ("of others on the subject", percent(gate["unseen_claimed"])),
        ]
    if blast is not None:
        interval = f"{blast['low']:.2%} to {blast['high']:.2%}"
        found += [
            ("blast radius", f"{blast['share']:.2%} of {blast['rows']} other texts ({interval})"),
            ("with all gates in force", _with_others(blast["share_with_active_set"])),
        ]
    cost = report["cost"]
    seconds = "?" if cost["seconds"] is None else f"{cost['seconds']:.0f}"
    return [*found, ("training", f"{cost['planned_steps']} steps, {seconds} s: {cost['basis']}")]


def _with_others(share: float | None) -> str:
    return "?" if share is None else f"{share:.2%}"


def _places(indices: Sequence[int]) -> str:
    shown = ", ".join(str(index + 1) for index in indices[:SHOWN])
    more = f" and {len(indices) - SHOWN} more" if len(indices) > SHOWN else ""
    return f"{len(indices)}" + (f" (no. {shown}{more})" if indices else "")


def _unknown(forget: ForgetSet) -> str:
    places = forget["already_unknown"]
    return (
        "not told without the scope `classify`"
        if places is None
        else f"{len(places)} ({percent(forget['already_unknown_share'])})"
    )
