"""The OpenAPI document, as far as types do not tell: the problem object, this server's limits, what may never be null.

``python -m bench.fuzz`` holds the service to every word of it.
"""

from __future__ import annotations

from typing import Any

from app.problems import Problem
from app.settings import Settings


def complete(document: dict[str, Any], settings: Settings) -> None:
    """Add it, in place. Doing it twice changes nothing."""
    schemas = document["components"]["schemas"]
    models = Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= {**models.pop("$defs"), "Problem": models}
    for operations in document["paths"].values():
        for operation in operations.values():
            for parameter in operation.get("parameters", []):
                _never_null(parameter["schema"])
    _not_null(schemas["ForgetTextIn"]["properties"]["label"])["enum"] = list(settings.labels)
    steps = _not_null(schemas["TrainingOptions"]["properties"]["max_steps"])
    steps["maximum"] = min(steps["maximum"], settings.max_training_steps)
    schemas["UnlearnRequestIn"]["properties"]["forget_texts"]["maxItems"] = settings.max_forget_texts
    _not_null(schemas["ClassifyIn"]["properties"]["texts"])["maxItems"] = settings.max_classify_texts


def _never_null(schema: dict[str, Any]) -> None:
    """A parameter is sent or it is not; in a URL or a header there is no null."""
    kinds = [kind for kind in schema.get("anyOf", []) if kind != {"type": "null"}]
    if len(kinds) == 1:
        del schema["anyOf"]
        schema |= kinds[0]


def _not_null(schema: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = next(kind for kind in schema["anyOf"] if kind != {"type": "null"})
    return found
