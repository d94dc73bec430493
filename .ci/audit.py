"""What we depend on: known vulnerabilities, and a software bill of materials in var/sbom.json.

    python .ci/audit.py [sbom|advisories]

Exit status: 0 all is well, 1 a known vulnerability or a bill that does not hold, 3 vulnerabilities could not be looked
up, because no advisory service answers or because it knows none of the packages, as mirrors of an index do not.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
BILL = ROOT / "var" / "sbom.json"
BIN = Path(sys.executable).parent
NOT_CHECKED = 3
SECONDS = 300


def make_bill() -> int:
    """Write the bill and see that all our requirements are in it, in versions that we ask for."""
    BILL.parent.mkdir(exist_ok=True)
    command = [BIN / "cyclonedx-py", "environment", sys.executable, "--pyproject", ROOT / "pyproject.toml"]
    subprocess.run([*command, "--output-reproducible", "--of", "JSON", "-o", BILL], check=True, timeout=SECONDS)
    wrong = check_bill(json.loads(BILL.read_text(encoding="utf-8")), requirements())
    for line in wrong:
        print(f"sbom: {line}")
    if not wrong:
        print(f"sbom: {BILL.relative_to(ROOT)} has all {len(requirements())} direct dependencies")
    return 1 if wrong else 0


def requirements() -> list[str]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        declared: list[str] = tomllib.load(file)["project"]["dependencies"]
    return declared


def check_bill(bill: dict[str, Any], declared: list[str]) -> list[str]:
    """What is wrong with a bill of materials, for people."""
    if bill.get("bomFormat") != "CycloneDX":
        return ["not a CycloneDX document"]
    there = {canonicalize_name(c["name"]): c.get("version", "") for c in bill.get("components", [])}
    wrong = []
    for line in declared:
        wanted = Requirement(line)
        version = there.get(canonicalize_name(wanted.name))
        if version is None:
            wrong.append(f"{wanted.name} is missing")
        elif not wanted.specifier.contains(version, prereleases=True):
            wrong.append(f"{wanted.name} is {version}, and we ask for {wanted.specifier}")
    return wrong


def look_up() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [BIN / "pip-audit", "--local", "--format", "json", "--output", report, "--progress-spinner", "off"]
        try:
            run = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            print(f"advisories: NOT CHECKED: the advisory service did not answer within {SECONDS} s")
            return NOT_CHECKED
        if not report.is_file():
            last = (run.stderr.strip().splitlines() or ["no reason given"])[-1]
            print(f"advisories: NOT CHECKED: pip-audit made no report: {last[:300]}")
            return NOT_CHECKED
        return judge(json.loads(report.read_text(encoding="utf-8")))


def judge(report: dict[str, Any]) -> int:
    """Tell people what a report of pip-audit's says. It calls an index that knows no package at all a clean result."""
    packages = report["dependencies"]
    looked_up = [package for package in packages if "vulns" in package]
    skipped = sorted(package["name"] for package in packages if "vulns" not in package)
    if not looked_up:
        print(f"advisories: NOT CHECKED: the index here knows no advisories on any of {len(packages)} packages")
        return NOT_CHECKED
    found = [(package, vulnerability) for package in looked_up for vulnerability in package["vulns"]]
    for package, vulnerability in found:
        mended = ", ".join(vulnerability["fix_versions"]) or "nothing yet"
        print(f"advisories: {package['name']} {package['version']}: {vulnerability['id']}, mended in {mended}")
    if not found:
        print(f"advisories: none on {len(looked_up)} packages")
    if skipped:
        print(f"advisories: not looked up: {', '.join(skipped)}")
    return 1 if found else 0


def main(what: str) -> int:
    results = {"sbom": [make_bill], "advisories": [look_up]}.get(what, [make_bill, look_up])
    codes = [step() for step in results]
    return 1 if 1 in codes else max(codes)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "all"))
