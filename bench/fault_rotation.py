"""A rotation of the master key that dies between two of its transactions, beside a request that waits."""

from __future__ import annotations

import base64
import secrets
import signal
from contextlib import closing
from typing import Any

from pydantic import SecretStr

from app import rotation
from app.settings import Settings
from app.vault import KEY_BYTES, Vault
from bench.fault_judge import Outcome
from bench.fault_site import Site, without_env_file
from bench.fault_steps import active, send_home


def die_in_rotation(site: Site, point: str, outcome: Outcome) -> None:
    """Cut off anywhere, everything opens with both keys; done again, everything opens with the new one alone."""
    active(site, outcome)
    send_home(site)
    for name in [name for name in site.shared if name.startswith("api")]:
        site.shared.pop(name).child.kill()  # it runs with the former key
    waits = site.submit(ring=False)
    former = site.knobs["master_key"]
    fresh = base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()
    two: dict[str, Any] = {"master_key": fresh, "previous_master_keys": f'["{former}"]'}
    rotating = site.command(point, "vault", "rotate", **two)
    if not rotating.ended(60) or rotating.status != -signal.SIGKILL:
        outcome.reasons.append(f"the rotation ended with status {rotating.status}: {rotating.output()[-400:]}")
        rotating.kill()
    first = site.worker(**two)
    outcome.judge(site.wait_end(waits), where="with both keys, ")
    first.signal(signal.SIGTERM)
    if not first.ended(60):
        outcome.reasons.append("the worker did not end")
    again = site.command("", "vault", "rotate", **two)
    if not again.ended(60) or again.status != 0:
        outcome.reasons.append(f"the second rotation ended with status {again.status}: {again.output()[-400:]}")
    site.knobs["master_key"] = fresh
    values = {**site.knobs, "master_key": SecretStr(fresh)}
    site.vault = site.stack.enter_context(closing(Vault.from_settings(Settings(**without_env_file(values)))))
    with site.sessions() as session:
        site.vault.adopt(session)
        under = rotation.tally(session, site.vault)
    if set(under) != {site.vault.key_id}:
        outcome.reasons.append(f"keys are wrapped under {dict(under)}, and the new one is {site.vault.key_id}")
    last = site.submit()
    site.shared["worker"] = site.worker()
    outcome.judge(site.wait_end(last), where="with the new key, ")
