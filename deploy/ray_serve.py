"""The same application as a Ray Serve deployment (extra ``letheon[ray]``).

    serve run deploy/ray_serve.yaml   # from the repository root: http://127.0.0.1:8000
    serve run deploy.ray_serve:app    # the same, with Serve's own defaults for address and logs

A replica is one process with its own model: what ``letheon serve --no-worker`` is elsewhere. It reads the service's
settings (DATABASE_URL, LETHEON_MASTER_KEY, LETHEON_MODEL, …) from its own environment, so that no secret goes through
Ray: set them where ``ray start`` runs, alike on every node, with an absolute LETHEON_HOME. Training workers run beside
Ray (``letheon worker``). These variables are read where ``serve run`` or ``serve deploy`` runs:

    LETHEON_RAY_MIN_REPLICAS  1    replicas that always run
    LETHEON_RAY_MAX_REPLICAS  1    more than the least: Ray adds replicas under load and takes them away again
    LETHEON_RAY_TARGET        32   requests in progress per replica that Ray scales towards
    LETHEON_RAY_MAX_ONGOING   256  requests in progress per replica, event streams included; more wait in Ray
    LETHEON_RAY_CPUS          1    CPUs of a replica; torch then uses so many threads
    LETHEON_RAY_GPUS          0    GPUs of a replica; may be a fraction
"""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any, Protocol

from anyio import CapacityLimiter, to_thread
from fastapi import FastAPI
from ray import serve
from sqlalchemy.exc import SQLAlchemyError

from app.errors import Busy, KeyStoreAway, NotReady
from app.settings import get_settings

if TYPE_CHECKING:
    from app.deps import Service

log = logging.getLogger("letheon.ray")

_checks = CapacityLimiter(1)
GRACEFUL_SECONDS = 40.0  # as uvicorn's 30 in `letheon serve`, and the model's end


class HasApp(Protocol):
    """What Serve adds to an ingress class."""

    app: FastAPI


def build() -> FastAPI:
    """The application, made in the replica: Serve runs its lifespan, which loads the model."""
    from app.main import create_app  # torch takes seconds to import: replicas only, not who deploys them

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    # Ray keeps what a replica prints: no key may be among it.
    return create_app(get_settings().model_copy(update={"first_key": False}), alone=True)


def check(service: Service) -> None:
    """Raises NotReady when a new replica may do better than this one: Serve replaces it after three such answers.

    While the database or the key store does not answer, no replica would do better. Then this one refuses each request
    by itself, and is back with them; a new one would first have to load the model. Nor is a busy one replaced.
    """
    try:
        service.serving.check()
    except (Busy, KeyStoreAway) as error:
        log.warning("%s: %s", error.code, error.detail)
    except NotReady as error:
        try:
            with service.engine.connect():
                pass
        except SQLAlchemyError:
            log.warning("not ready, with the database out of reach: %s", error.detail)
            return
        raise


class Letheon:
    """One replica."""

    async def check_health(self: HasApp) -> None:
        # It may wait for the database, and the event loop must not; nor may it wait behind routes that do.
        await to_thread.run_sync(check, self.app.state.service, limiter=_checks)


def number(name: str, default: float, least: float) -> float:
    """A variable's number. Raises ValueError."""
    given = os.environ.get(name) or str(default)
    try:
        value = float(given)
    except ValueError:
        value = float("nan")
    if not least <= value < float("inf"):  # a NaN is in no range
        raise ValueError(f"{name} must be a number of {least:g} or more")
    return value


def options() -> dict[str, Any]:
    """How Serve is to run the replicas, from the environment. Raises ValueError."""
    least, most = (int(number(f"LETHEON_RAY_{which}_REPLICAS", 1, 1)) for which in ("MIN", "MAX"))
    ongoing = int(number("LETHEON_RAY_MAX_ONGOING", 256, 1))
    target = number("LETHEON_RAY_TARGET", min(32, ongoing), 1)
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "max_replicas": most,
                "target_ongoing_requests": target,
                "downscale_delay_s": 600.0,  # a replica that is wanted again has to load its model first
            }
        }
    return scaling | {
        "max_ongoing_requests": ongoing,
        "max_queued_requests": ongoing,  # for each proxy; beyond it 503, as the application does with its own queue
        "ray_actor_options": {
            "num_cpus": number("LETHEON_RAY_CPUS", 1, 0),
            "num_gpus": number("LETHEON_RAY_GPUS", 0, 0),
        },
        "health_check_period_s": 10.0,
        "health_check_timeout_s": 30.0,
        "graceful_shutdown_timeout_s": GRACEFUL_SECONDS,
        # The application has an access log of its own, with routes and without anything that a client wrote.
        "logging_config": {"enable_access_log": False},
    }


app = serve.deployment(name="letheon", **options())(serve.ingress(build)(Letheon)).bind()
