"""What CI makes of reports on our dependencies. The reports themselves come from `make audit`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ci_audit", ROOT / ".ci" / "audit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def skipped(name: str) -> dict[str, Any]:
    return {"name": name, "skip_reason": f"Dependency not found on PyPI and could not be audited: {name} (1.0)"}


def looked_up(name: str, *ids: str) -> dict[str, Any]:
    vulns = [{"id": found, "fix_versions": ["1.1"], "aliases": [], "description": ""} for found in ids]
    return {"name": name, "version": "1.0", "vulns": vulns}


def test_an_index_that_knows_no_advisories_is_not_a_clean_result(
    audit: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    """pip-audit says "No known vulnerabilities found", and succeeds, where a mirror answers 404 for every package."""
    assert audit.judge({"dependencies": [skipped("torch"), skipped("fastapi")]}) == audit.NOT_CHECKED
    assert "NOT CHECKED" in capsys.readouterr().out
    assert audit.judge({"dependencies": []}) == audit.NOT_CHECKED
    assert audit.judge({"dependencies": [skipped("letheon"), looked_up("fastapi")]}) == 0
    assert "not looked up: letheon" in capsys.readouterr().out
    assert audit.judge({"dependencies": [looked_up("a"), looked_up("b", "PYSEC-1", "PYSEC-2")]}) == 1
    assert "b 1.0: PYSEC-2, mended in 1.1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stderr", "shown"), [("Traceback\nConnectionError: no route\n", "no route"), ("", "no reason")]
)
def test_a_service_that_does_not_answer_is_told(
    audit: ModuleType,
    stderr: str,
    shown: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "pip-audit").write_text(f"#!{sys.executable}\nimport sys\nsys.exit({stderr!r} or 1)\n")
    (tmp_path / "pip-audit").chmod(0o755)
    monkeypatch.setattr(audit, "BIN", tmp_path)
    assert audit.look_up() == audit.NOT_CHECKED
    printed = capsys.readouterr().out
    assert "NOT CHECKED" in printed and shown in printed


def test_a_bill_has_all_that_we_ask_for(audit: ModuleType) -> None:
    declared = audit.requirements()
    assert any(line.startswith("torch==") for line in declared)
    names = {audit.Requirement(line).name: line for line in declared}
    from importlib.metadata import version

    components = [{"name": name.upper(), "version": version(name)} for name in names]
    bill = {"bomFormat": "CycloneDX", "components": components}
    assert audit.check_bill(json.loads(json.dumps(bill)), declared) == []
    components[0]["version"] = "0.0.1"
    gone = components.pop()["name"].lower()
    wrong = audit.check_bill(bill, declared)
    assert len(wrong) == 2 and wrong[1] == f"{gone} is missing" and "is 0.0.1" in wrong[0]
    assert audit.check_bill({"components": []}, declared) == ["not a CycloneDX document"]


def test_ci_goes_on_where_nothing_could_be_looked_up_and_only_there(tmp_path: Path) -> None:
    """`.ci/run` itself, with `make` and the audit replaced by what they would exit with."""
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (tmp_path / "make").write_text("#!/bin/sh\nexit 0\n")
    (tmp_path / "make").chmod(0o755)
    for code, expected in ((0, 0), (1, 1), (3, 0)):
        (folder / "python").write_text(f"#!/bin/sh\nexit {code}\n")
        (folder / "python").chmod(0o755)
        done = subprocess.run(
            ["bash", str(tmp_path / ".ci" / "run")],
            env={"PATH": f"{tmp_path}:/usr/bin:/bin"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == expected
        assert ("NOT CHECKED" in done.stdout) is (code == 3)
