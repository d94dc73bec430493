"""`letheon keys`: expiry, limits of a key's own, last use."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner
from vault_kit import away

from app import cli, db, keys
from app.cli_local import parse_expiry, parse_limits
from app.errors import InvalidInput
from app.keystore import KeyStore
from app.settings import get_settings

NOW = datetime(2026, 11, 28, 12, 30, tzinfo=UTC)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, list(arguments))


def document(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    for name in ("DATABASE_URL", "BROKER_URL"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    monkeypatch.setenv("LETHEON_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    get_settings.cache_clear()
    yield home
    get_settings.cache_clear()


def test_expiry_and_limits_are_kept_and_shown() -> None:
    options = ("--expires", "90d", "--limit", "requests_per_day=5", "--limit", "rate_per_minute=0")
    made = document(run("keys", "create", "ci", *options, "--json"))
    expires = datetime.fromisoformat(made["expires_at"])
    assert timedelta(days=89, hours=23) < expires - datetime.now(UTC) <= timedelta(days=90)
    assert made["limits"] == {"requests_per_day": 5, "rate_per_minute": 0}
    engine = db.make_engine(get_settings().effective_database_url)
    with db.make_sessions(engine).begin() as session:
        assert keys.authenticate(session, made["key"]).expires_at == expires
        keys.note_uses(session, {made["id"]: NOW})
    engine.dispose()
    [listed] = document(run("keys", "list", "--json"))["items"]
    assert listed == {name: made[name] for name in listed} | {"last_used_at": NOW.isoformat()}
    table = run("keys", "list").stdout
    for shown in (made["id"], made["expires_at"][:10], "2026-11-28", "requests_per_day=5"):
        assert shown in table.replace("\n", ""), table
    assert made["key"] not in table


def test_a_plain_key_never_expires() -> None:
    made = document(run("keys", "create", "ci", "--json"))
    assert (made["expires_at"], made["last_used_at"], made["limits"]) == (None, None, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--expires", "soon"), "--expires takes days"),
        (("--expires", "0d"), "must be in the future"),
        (("--expires", "-1d"), "--expires takes days"),
        (("--expires", "99999d"), "--expires takes days"),
        (("--expires", "2020-01-31"), "must be in the future"),
        (("--limit", "requests_per_day"), "--limit takes name=number"),
        (("--limit", "requests_per_day=many"), "--limit takes name=number"),
        (("--limit", "requests_per_day=-1"), "--limit takes name=number"),
        (("--limit", "requests_per_day=1", "--limit", "requests_per_day=2"), "each name once"),
        (("--limit", "requests=5"), "a limit is one of rate_per_minute,"),
        (("--limit", "texts_per_day=2147483648"), "must be 0 (none) to 2147483647"),
    ],
)
def test_bad_options(options: tuple[str, ...], message: str) -> None:
    result = run("keys", "create", "ci", *options)
    assert result.exit_code == 1 and result.stdout == ""
    assert message in " ".join(result.stderr.split())


def test_dates() -> None:
    assert parse_expiry("1d", NOW) == NOW + timedelta(days=1)
    assert parse_expiry("2027-01-31", NOW) == datetime(2027, 1, 31, tzinfo=UTC)
    assert parse_expiry("2027-01-31T12:00+02:00", NOW) == datetime(2027, 1, 31, 10, tzinfo=UTC)
    assert parse_limits([]) == {}
    for value in ("", "d", "1.5d", "٣d", "90 days", "2027-02-30", "9" * 400 + "d"):
        with pytest.raises(InvalidInput):
            parse_expiry(value, NOW)


def test_a_revocation_is_remembered_by_the_key_store(own_home: Path) -> None:
    key = document(run("keys", "create", "desk", "--scope", "requests", "--json"))
    run("keys", "revoke", key["id"])
    store = KeyStore(get_settings().effective_keystore_url)
    assert store.ended() == {key["id"]}
    store.close()
    other = document(run("keys", "create", "desk", "--scope", "requests", "--json"))
    with away(store):
        done = run("keys", "revoke", other["id"])
    assert done.exit_code == 0 and "a worker tells it" in done.stderr
    assert document(run("keys", "list", "--json"))["items"][1]["revoked_at"]
