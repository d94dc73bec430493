"""The Kubernetes manifests: valid by Kubernetes' own schemas, and true to the application that they run."""

from __future__ import annotations

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import typer
import yaml
from api_kit import make_settings, tiny_llm
from databases import database_kinds, fresh_database
from manifests import FOLDER, VERSIONS, Manifest, check, containers, documents, find, manifests, pods
from worker_kit import PYTHONPATH, ROOT

from app import db
from app.cli import app as cli
from app.main import create_app, make_server
from app.settings import Settings

APP = {"app.kubernetes.io/name": "letheon"}


def name_of(manifest: Manifest) -> str:
    return f"{manifest['kind']}/{manifest['metadata']['name']}"


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("manifest", manifests(), ids=name_of)
def test_every_manifest_is_valid(manifest: Manifest, version: str) -> None:
    check(manifest, version)


@pytest.mark.parametrize(
    ("kind", "name", "path", "value"),
    [
        ("Deployment", "letheon-api", ("spec", "replicas"), "two"),
        ("Deployment", "letheon-api", ("spec", "template", "spec", "readOnlyRootFilesystem"), True),
        ("Deployment", "letheon-worker", ("spec", "strategy", "rollingUpdate", "maxSurge"), None),
        ("Deployment", "letheon-worker", ("spec", "selector"), ...),
        ("Job", "letheon-migrate-0-1-0", ("spec", "backofLimit"), 6),
        ("NetworkPolicy", "letheon-api", ("spec", "ingress"), {}),
        ("ScaledObject", "letheon-api", ("spec", "maxReplicaCount"), "many"),
        ("ScaledObject", "letheon-api", ("spec", "maxReplicas"), 3),
        ("ScaledObject", "letheon-worker", ("spec", "scaleTargetRef", "name"), ...),
        ("ScaledObject", "letheon-api", ("spec", "fallback"), {"failureThreshold": 4, "replicas": 4}),
        ("ScaledObject", "letheon-worker", ("spec", "triggers", 1, "metricType"), "Value"),
        ("ScaledObject", "letheon-worker", ("spec", "triggers", 0, "metricType"), ...),
        ("TriggerAuthentication", "letheon-keda", ("spec", "secretTargetRef", 0, "key"), ...),
        ("TriggerAuthentication", "letheon-keda", ("spec", "secretRef"), []),
    ],
)
def test_one_wrong_field_is_refused(kind: str, name: str, path: tuple[str | int, ...], value: Any) -> None:
    """``...`` takes the field away."""
    manifest = copy.deepcopy(find(kind, name))
    target: Any = manifest
    for step in path[:-1]:
        target = target[step]
    if value is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        check(manifest, VERSIONS[-1])


def build(folder: str) -> list[Manifest]:
    """What ``kubectl apply -k`` would send."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(FOLDER / folder)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl, whose kustomize builds without a cluster")
def test_kustomize_builds_what_was_checked() -> None:
    base, keda = build("base"), build("keda")
    for manifest in [*base, *keda]:
        check(manifest, VERSIONS[-1])
        assert manifest["metadata"].get("namespace", "letheon") == "letheon"
    secrets = {name_of(m) for m in manifests() if m["kind"] == "Secret"}
    assert {name_of(m) for m in keda} == {name_of(m) for m in manifests()} - secrets
    assert {name_of(m) for m in base} < {name_of(m) for m in keda}
    assert all("replicas" in m["spec"] for m in base if m["kind"] == "Deployment")
    assert not any("replicas" in m["spec"] for m in keda if m["kind"] == "Deployment")  # KEDA's to say


def test_no_file_is_forgotten() -> None:
    for folder in ("base", "keda"):
        listed = {
            name for name in documents(FOLDER / folder / "kustomization.yaml")[0]["resources"] if name != "../base"
        }
        there = {path.name for path in (FOLDER / folder).glob("*.yaml")}
        assert listed == there - {"kustomization.yaml", "secret.example.yaml"}


def test_objects_find_each_other() -> None:
    made = [m for m in manifests() if "template" in m.get("spec", {})]
    all_labels = {m["metadata"]["name"]: m["spec"]["template"]["metadata"]["labels"] for m in made}
    for labels in all_labels.values():
        assert APP.items() <= labels.items()
    for manifest in manifests():
        spec, kind = manifest.get("spec", {}), manifest["kind"]
        if kind == "Deployment":
            labels = all_labels[manifest["metadata"]["name"]]
            assert spec["selector"]["matchLabels"].items() <= labels.items()
            for rule in spec["template"]["spec"].get("topologySpreadConstraints", []):
                assert rule["labelSelector"]["matchLabels"] == spec["selector"]["matchLabels"]
        elif kind in ("Service", "PodDisruptionBudget"):
            wanted = spec["selector"].get("matchLabels", spec["selector"])
            assert [n for n, labels in all_labels.items() if wanted.items() <= labels.items()] == ["letheon-api"]
        elif kind == "NetworkPolicy" and spec["podSelector"]:
            wanted = spec["podSelector"]["matchLabels"]
            assert any(wanted.items() <= labels.items() for labels in all_labels.values())
        elif kind == "ScaledObject":
            target = find("Deployment", spec["scaleTargetRef"]["name"])
            assert spec["minReplicaCount"] == target["spec"]["replicas"] < spec["maxReplicaCount"]
            if "fallback" in spec:
                assert spec["minReplicaCount"] <= spec["fallback"]["replicas"] <= spec["maxReplicaCount"]
            for trigger in spec["triggers"]:
                if "authenticationRef" in trigger:
                    find("TriggerAuthentication", trigger["authenticationRef"]["name"])
    for container in containers():
        for source in container["envFrom"]:
            find("ConfigMap", source["configMapRef"]["name"])
        for variable in container.get("env", []):
            if reference := variable["valueFrom"].get("secretKeyRef"):
                assert reference["key"] in find("Secret", reference["name"])["stringData"]
    for reference in find("TriggerAuthentication", "letheon-keda")["spec"]["secretTargetRef"]:
        assert reference["key"] in find("Secret", reference["name"])["stringData"]


def test_the_probes_and_the_port_are_the_applications(tmp_path: Path) -> None:
    settings = make_settings(f"sqlite:///{tmp_path}/x.db", tmp_path)
    application = create_app(settings, tiny_llm())
    paths = set(application.openapi()["paths"])
    (api,) = pods()["letheon-api"]["containers"]
    probes = {name: api[f"{name}Probe"]["httpGet"] for name in ("startup", "readiness", "liveness")}
    assert {name: probe["path"] for name, probe in probes.items()} == {
        "startup": "/livez",
        "readiness": "/readyz",
        "liveness": "/livez",
    }
    assert {probe["path"] for probe in probes.values()} <= paths
    (port,) = api["ports"]
    assert {probe["port"] for probe in probes.values()} == {port["name"]}
    assert (
        api["command"][-2:] == ["--port", str(port["containerPort"])] == ["--port", str(Settings(_env_file=None).port)]
    )
    assert find("Service", "letheon-api")["spec"]["ports"][0]["targetPort"] == port["name"]
    # There is time for all that a stop does: the pause for routing, uvicorn's own, the model's end.
    pause = int(api["lifecycle"]["preStop"]["exec"]["command"][1])
    uvicorn = make_server(application, settings).config.timeout_graceful_shutdown
    assert uvicorn is not None and pods()["letheon-api"]["terminationGracePeriodSeconds"] >= pause + uvicorn + 10
    assert pods()["letheon-worker"]["terminationGracePeriodSeconds"] >= 90


def test_every_variable_is_a_setting_and_values_are_accepted() -> None:
    known = {f"LETHEON_{name.upper()}" for name in Settings.model_fields} | {"DATABASE_URL", "BROKER_URL"}
    others = {"HF_HOME", "OMP_NUM_THREADS"}  # of libraries
    text = (FOLDER / "base" / "config.yaml").read_text()
    config = find("ConfigMap", "letheon")["data"]
    named = set(config) | {v["name"] for c in containers() for v in c.get("env", [])}
    named |= set(re.findall(r"# ([A-Z_]{4,}):", text)) | set(find("Secret", "letheon")["stringData"])
    assert named - known - others == set()
    values = {name.removeprefix("LETHEON_").lower(): value for name, value in config.items() if name in known}
    settings = Settings(_env_file=None, **values)
    assert not settings.first_key
    for pod in pods().values():  # LETHEON_API_PORT=tcp://… of a service would be read as a setting, or hide one
        assert pod["enableServiceLinks"] is False


def test_images_are_the_same_everywhere_and_of_this_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    version = project["version"]
    images = {container["image"] for container in containers()}
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert (
        images == {f"letheon:{version}"} == {compose[name]["image"] for name in ("api", "worker", "migrate", "assets")}
    )
    (image,) = documents(FOLDER / "base" / "kustomization.yaml")[0]["images"]
    assert image == {"name": "letheon", "newTag": version}
    assert find("Job", f"letheon-migrate-{version.replace('.', '-')}")["spec"]["template"]


def test_commands_exist() -> None:
    group = typer.main.get_command(cli)
    context = typer.Context(group)
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    assert "letheon" in scripts

    def exists(words: list[str]) -> None:
        command = group
        while words and not words[0].startswith("-"):
            command = command.get_command(context, words.pop(0))  # type: ignore[attr-defined]
            assert command is not None
        options = {option for parameter in command.params for option in parameter.opts + parameter.secondary_opts}
        assert {word for word in words if word.startswith("--")} <= options

    for name, pod in pods().items():
        (main,) = pod["containers"]
        command = list(main["command"])
        assert command == compose[name.split("-")[1]]["command"]
        if command[0] == "letheon":
            exists(command[1:])
        else:
            assert command[0] == "alembic" and (ROOT / "alembic.ini").is_file()
        for init in pod.get("initContainers", []):
            for words in re.findall(r"\bletheon ([a-z ]+?)(?:;|$)", init["command"][-1]):
                exists(words.split())
    (worker,) = pods()["letheon-worker"]["containers"]
    assert worker["readinessProbe"]["exec"]["command"] == compose["worker"]["healthcheck"]["test"][1:]


def test_pods_keep_to_the_restricted_standard() -> None:
    assert find("Namespace", "letheon")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    for pod in pods().values():
        assert pod["automountServiceAccountToken"] is False
        context = pod["securityContext"]
        assert context["runAsNonRoot"] is True and context["seccompProfile"] == {"type": "RuntimeDefault"}
        user = re.search(r"useradd --uid (\d+)", (ROOT / "Dockerfile").read_text())
        assert user is not None and context["runAsUser"] == context["runAsGroup"] == int(user[1])
        assert all("emptyDir" in volume for volume in pod.get("volumes", []))
    for container in containers():
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False and context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"requests", "limits"} <= set(container["resources"])


def test_only_what_needs_it_gets_the_master_key_and_nothing_real_is_written_down() -> None:
    holders = {c["name"] for c in containers() if "LETHEON_MASTER_KEY" in {v["name"] for v in c.get("env", [])}}
    assert holders == {"api", "worker"}
    values = find("Secret", "letheon")["stringData"] | find("Secret", "letheon-keda")["stringData"]
    for name, value in values.items():
        assert value in ("", "5432", "letheon", "letheon_keda", "verify-full") or ".example" in value, name
    assert all(m["metadata"]["name"].startswith("letheon") for m in manifests() if m["kind"] == "Secret")


# --- the shell of the init containers, run for real -------------------------------------------------------------------


def init_command(pod: str, name: str) -> list[str]:
    (container,) = [c for c in pods()[pod]["initContainers"] if c["name"] == name]
    command: list[str] = container["command"]
    return command


def init_environment(own: dict[str, str]) -> dict[str, str]:
    """A `letheon` and a `python` that are this environment's come first on the path."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {"PATH": path, "PYTHONPATH": PYTHONPATH, **own}


def run_init(
    pod: str, name: str, environment: dict[str, str], cwd: Path, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Raises TimeoutExpired."""
    return subprocess.run(
        init_command(pod, name),
        env=init_environment(environment),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )


def test_pods_wait_for_the_migration(tmp_path: Path) -> None:
    scripts = {pods()[pod]["initContainers"][0]["command"][-1] for pod in ("letheon-api", "letheon-worker")}
    assert len(scripts) == 1
    with fresh_database(database_kinds()[-1], tmp_path, empty=True) as url:
        command, environment = init_command("letheon-api", "migrated"), init_environment({"DATABASE_URL": url})
        waiting = subprocess.Popen(
            command, env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        with waiting:
            try:
                assert waiting.stdout is not None
                said = next(line for line in waiting.stdout if "waiting for the database" in line)
                assert "app.errors.NotReady: " in said, "it says why"
                assert waiting.poll() is None
            finally:
                os.killpg(waiting.pid, signal.SIGKILL)  # its `sleep` too
        db.upgrade(url)
        assert run_init("letheon-api", "migrated", {"DATABASE_URL": url}, tmp_path, 300).returncode == 0


def test_the_collector_of_the_example_is_within_reach() -> None:
    """In the cluster only: the network policy lets no pod send to that port elsewhere."""
    (port,) = re.findall(r"OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:(\d+)", (ROOT / ".env.example").read_text())
    rules = find("NetworkPolicy", "letheon-egress")["spec"]["egress"]
    (rule,) = (rule for rule in rules if {"port": int(port)} in rule["ports"])
    assert rule["to"] == [{"namespaceSelector": {}}] and rule["ports"] == [{"port": int(port)}]


@pytest.mark.parametrize("pod", ["letheon-api", "letheon-worker"])
def test_nothing_is_fetched_where_model_and_data_are_configured(pod: str, tmp_path: Path) -> None:
    own = {"LETHEON_MODEL": "/models/mine", "LETHEON_RETAIN": "/data/mine.jsonl", "LETHEON_HOME": str(tmp_path)}
    done = run_init(pod, "assets", own, tmp_path, 60)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (0, "", [])
