"""The Kubernetes manifests, read and checked against the schemas of Kubernetes and of KEDA."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml
from worker_kit import ROOT

FOLDER = ROOT / "deploy" / "kubernetes"
VERSIONS = ("1.30", "1.37")  # of Kubernetes: the oldest and the newest that the manifests are held against
Manifest = dict[str, Any]
# What KEDA's definitions do not say and its admission webhook asks for. Up to 2.17 a fallback needs triggers of this
# type (kedacore/keda #5629), and some releases want it written down, though it is the default (#6066, #6696).
_FALLBACK: Manifest = {
    "if": {"properties": {"spec": {"required": ["fallback"]}}},
    "then": {
        "properties": {
            "spec": {
                "properties": {
                    "triggers": {
                        "items": {
                            "required": ["metricType"],
                            "properties": {"metricType": {"const": "AverageValue"}},
                        }
                    }
                }
            }
        }
    },
}


def documents(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document is not None]


def manifests() -> list[Manifest]:
    """All objects, the example secrets among them."""
    files = sorted(path for path in FOLDER.rglob("*.yaml") if path.name != "kustomization.yaml")
    return [document for path in files for document in documents(path)]


def find(kind: str, name: str) -> Manifest:
    (found,) = [m for m in manifests() if (m["kind"], m["metadata"]["name"]) == (kind, name)]
    return found


def pods() -> dict[str, Manifest]:
    """Pod specifications by the name of what makes them."""
    return {
        m["metadata"]["name"]: m["spec"]["template"]["spec"] for m in manifests() if "template" in m.get("spec", {})
    }


def containers() -> list[Manifest]:
    return [c for pod in pods().values() for c in [*pod.get("initContainers", []), *pod["containers"]]]


def check(manifest: Manifest, version: str) -> None:
    """Raises jsonschema.ValidationError. Unknown fields are errors too."""
    if manifest["apiVersion"] == "keda.sh/v1alpha1":
        jsonschema.Draft202012Validator(keda_schema(manifest["kind"])).validate(manifest)
    else:
        kubernetes_validate.validate(manifest, version, strict=True)


@cache
def keda_schema(kind: str) -> Manifest:
    """From the models that cloudcoil generates of KEDA 2.16's own resource definitions."""
    from cloudcoil.models.keda import v1alpha1

    schema: Manifest = getattr(v1alpha1, kind).model_json_schema(by_alias=True)
    closed: Manifest = _closed(schema)
    closed["required"] = ["apiVersion", "kind", "metadata", "spec"]  # the models fill in the first two
    if kind == "ScaledObject":
        closed["allOf"] = [_FALLBACK]
    return closed


def _closed(schema: Any) -> Any:
    """The schema with objects that take no other fields than their own, which is what a strict API server does."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _closed(value) for name, value in schema.items()}
    if made.get("type") == "object" and isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made
