"""The container files, as far as they can be checked without a container engine: structure, names, pins, secrets.

``docker compose config`` is run on top of that where a compose client is installed; the structure is checked anyway.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
LETHEON = ("api", "worker", "migrate", "assets")


def load(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((ROOT / name).read_text())
    return loaded


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return load("docker-compose.yml")


def test_the_services_that_are_promised(compose: dict[str, Any]) -> None:
    assert set(compose["services"]) == {*LETHEON, "gateway", "postgres", "redis"}


def test_long_running_services_have_health_checks_and_restart(compose: dict[str, Any]) -> None:
    for name in ("api", "gateway", "worker", "postgres", "redis"):
        service = compose["services"][name]
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL"), name
        assert service["restart"] == "unless-stopped", name
    for name in ("migrate", "assets"):
        assert compose["services"][name]["restart"] == "no", name


def test_dependencies_exist_and_wait_for_the_right_thing(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for needed, how in service.get("depends_on", {}).items():
            once = services[needed]["restart"] == "no"
            wanted = "service_completed_successfully" if once else "service_healthy"
            assert how["condition"] == wanted, (name, needed)
    for name in ("api", "worker"):
        assert "migrate" in services[name]["depends_on"]


def test_volumes_and_networks_are_declared(compose: dict[str, Any]) -> None:
    used = {v.split(":")[0] for s in compose["services"].values() for v in s.get("volumes", []) if v[0] != "."}
    assert used == set(compose["volumes"]) == {"letheon-home", "postgres-data", "redis-data"}
    assert {n for s in compose["services"].values() for n in s["networks"]} == set(compose["networks"])
    for name in ("postgres", "redis"):
        assert compose["services"][name]["networks"] == ["backend"]
        assert "ports" not in compose["services"][name]
    assert compose["networks"]["backend"]["internal"] is True


def test_secrets_come_from_the_environment_and_must_be_set(compose: dict[str, Any]) -> None:
    text = (ROOT / "docker-compose.yml").read_text()
    for name in ("POSTGRES_PASSWORD", "LETHEON_MASTER_KEY"):
        for use in re.findall(rf"\$\{{{name}[^}}]*\}}", text):
            assert ":?" in use, use
        assert f"\n{name}=\n" in (ROOT / ".env.example").read_text()
    for name in LETHEON:
        assert compose["services"][name]["env_file"] == [".env"]
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_every_setting_that_is_named_exists(compose: dict[str, Any]) -> None:
    known = {f"LETHEON_{name.upper()}" for name in Settings.model_fields} | {"DATABASE_URL", "BROKER_URL"}
    others = {"HF_HOME", "POSTGRES_PASSWORD", "PIP_ARGS", "LETHEON_URL", "LETHEON_BIND", "OTEL_EXPORTER_OTLP_ENDPOINT"}
    others.add("OMP_NUM_THREADS")  # every process reads it
    named = {name for service in LETHEON for name in compose["services"][service]["environment"]}
    named |= set(load("docker-compose.gpu.yml")["services"]["api"]["environment"])
    named |= set(re.findall(r"^#? ?([A-Z_]+)=", (ROOT / ".env.example").read_text(), flags=re.MULTILINE))
    assert named - known - others == set()


def test_the_settings_take_what_the_example_offers(tmp_path: Path) -> None:
    lines = (ROOT / ".env.example").read_text().splitlines()
    offered = [line.removeprefix("# ") for line in lines if re.match(r"# LETHEON_[A-Z_]+=", line)]
    env = tmp_path / "env"
    env.write_text("\n".join(offered))
    assert Settings(_env_file=env).labels == ["negative", "positive"]


def test_letheon_containers_are_confined(compose: dict[str, Any]) -> None:
    for name in LETHEON:
        service = compose["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_api_and_worker_can_be_scaled(compose: dict[str, Any]) -> None:
    """`--scale` needs services without a port or a name of the host's; only the gateway has a port."""
    for name, service in compose["services"].items():
        assert "container_name" not in service and "hostname" not in service, name
        assert ("ports" in service) == (name == "gateway"), name
    assert compose["services"]["gateway"]["ports"] == ["${LETHEON_BIND:-127.0.0.1}:8600:8600"]


def test_the_gateway_is_confined_and_finds_the_api(compose: dict[str, Any]) -> None:
    gateway = compose["services"]["gateway"]
    assert gateway["read_only"] is True and gateway["cap_drop"] == ["ALL"]
    assert gateway["security_opt"] == ["no-new-privileges:true"]
    (mount,) = gateway["volumes"]
    source, target, how = mount.split(":")
    assert (ROOT / source).is_file() and how == "ro"
    assert target == "/usr/local/etc/haproxy/haproxy.cfg"  # what the image reads
    shared = set(gateway["networks"]) & set(compose["services"]["api"]["networks"])
    assert shared and "backend" not in gateway["networks"]
    config = (ROOT / source).read_text()
    command = compose["services"]["api"]["command"]
    assert f"api:{command[command.index('--port') + 1]}" in config


def test_no_key_is_printed_into_a_log_that_is_kept(compose: dict[str, Any]) -> None:
    for name in LETHEON:
        assert compose["services"][name]["environment"]["LETHEON_FIRST_KEY"] == "false"
    assert Settings(_env_file=None, first_key="false").first_key is False


def test_the_gpu_override_adds_to_services_that_exist(compose: dict[str, Any]) -> None:
    override = load("docker-compose.gpu.yml")
    assert set(override["services"]) == {"api", "worker"}
    for service in override["services"].values():
        assert service["environment"] == {"LETHEON_DEVICE": "cuda"}
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}


def test_the_image_does_not_run_as_root() -> None:
    last_stage = (ROOT / "Dockerfile").read_text().split("\nFROM ")[-1]
    assert re.search(r"^USER letheon$", last_stage, flags=re.MULTILINE)
    assert last_stage.index("USER letheon") < last_stage.index("CMD ")


def test_the_image_context_holds_what_the_build_copies_and_no_state() -> None:
    kept = [line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {setup["package-dir"].get(name, name.replace(".", "/")) for name in setup["packages"]}
    assert {folder.split("/")[0] for folder in folders} | {"alembic", "alembic.ini", "pyproject.toml"} <= set(kept)
    assert not {"var", ".env", ".venv", ".git"} & set(kept)


def test_torch_is_pinned_alike_everywhere() -> None:
    pins = {
        name: set(re.findall(r"torch==[0-9.]+[0-9]", (ROOT / name).read_text()))
        for name in ("pyproject.toml", "Makefile", "Dockerfile")
    }
    assert len(set.union(*pins.values())) == 1, pins
    assert all(pins.values())


def compose_client() -> list[str] | None:
    for command in (["docker", "compose"], ["docker-compose"]):
        if shutil.which(command[0]) is None:
            continue
        if subprocess.run([*command, "version"], capture_output=True, check=False).returncode == 0:
            return command
    return None


def test_compose_reads_the_files(compose: dict[str, Any], tmp_path: Path) -> None:
    client = compose_client()
    if client is None:
        pytest.skip("no Docker Compose: its own reading of the files is not checked")
    for name in ("docker-compose.yml", "docker-compose.gpu.yml"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=x\nLETHEON_MASTER_KEY=x\n")
    files = ["-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml"]
    environment = {k: v for k, v in os.environ.items() if k not in ("POSTGRES_PASSWORD", "LETHEON_MASTER_KEY")}
    done = subprocess.run(
        [*client, *files, "config", "--services"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == set(compose["services"])
