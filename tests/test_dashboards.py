"""The dashboard, the alerts and the documentation speak of metrics that exist, in queries that parse."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from api_kit import claim, running
from manifests import find
from prometheus_client.metrics_core import Metric

from app import job_queue

ROOT = Path(__file__).resolve().parent.parent
PROMETHEUS, GRAFANA = ROOT / "deploy" / "prometheus", ROOT / "deploy" / "grafana" / "letheon.json"
DOCUMENT = ROOT / "docs" / "metrics.md"
OF_PROMETHEUS = {"up": {"job", "instance"}}
"""What Prometheus says about a scrape itself."""
PROMTOOL = shutil.which("promtool")
TARGET = {"job", "instance"}
"""What it adds to every sample."""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> list[Metric]:
    """Every family of a service in which everything has happened once."""
    folder = tmp_path_factory.mktemp("exported")
    with running(f"sqlite:///{folder}/letheon.db", folder, keystore_url=f"sqlite:///{folder}/keystore.db") as api:
        headers = api.key()
        api.classify(headers, "a good film")
        claimed = claim(api.service, api.submit(headers)["id"])
        with api.service.sessions.begin() as session:
            job_queue.record_progress(session, claimed, {"step": 1, "total_steps": 2})
        return list(api.service.metrics.registry.collect())


@pytest.fixture(scope="module")
def series(exported: list[Metric]) -> dict[str, dict[str, set[str]]]:
    """Sample name → label → values that are exported."""
    found: dict[str, dict[str, set[str]]] = {}
    for family in exported:
        assert family.samples, f"{family.name} has no value in this test"
        for sample in family.samples:
            labels = found.setdefault(sample.name, {})
            for name, value in sample.labels.items():
                labels.setdefault(name, set()).add(value)
    return found


def test_the_table_lists_exactly_what_is_exported(exported: list[Metric]) -> None:
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \|([^|]*)\|", DOCUMENT.read_text(encoding="utf-8"), flags=re.MULTILINE)
    documented = {name: (kind, sorted(re.findall(r"`(\w+)`", labels))) for name, kind, labels in rows}
    assert len(documented) == len(rows), "no metric is listed twice"
    actual = {}
    for family in exported:
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        actual[name] = (family.type, sorted(labels))
    if not Path("/proc/self/stat").exists():  # then the library says nothing of the process
        documented = {name: found for name, found in documented.items() if not name.startswith("process_")}
    assert documented == actual


def test_names_and_help_are_good_prometheus(exported: list[Metric]) -> None:
    for family in exported:
        assert family.documentation.endswith(".") or family.name.startswith("process_")
        assert re.fullmatch(r"(letheon|process)_[a-z_]+", family.name)
        assert not family.name.endswith(("_milliseconds", "_ms", "_count", "_sum"))


def queries_of_the_dashboard() -> Iterator[str]:
    board = json.loads(GRAFANA.read_text(encoding="utf-8"))
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield target["expr"]
    for annotation in board["annotations"]["list"]:
        yield annotation["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"])
            assert match is not None
            yield match[1]


def rules() -> list[dict[str, Any]]:
    document = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text(encoding="utf-8"))
    return [rule for group in document["groups"] for rule in group["rules"]]


def selectors(query: str) -> list[promql_parser.VectorSelector]:
    """Every series that a query reads. Raises ValueError when Prometheus could not parse it."""
    # Grafana puts these in before Prometheus sees the query.
    plain = query.replace("$__rate_interval", "1m").replace("$instance", ".*")
    found: list[promql_parser.VectorSelector] = []

    def visit(node: promql_parser.Expr) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            found.append(node)

    promql_parser.walk(promql_parser.parse(plain), visit)
    return found


SCALING = {trigger["name"]: trigger for trigger in find("ScaledObject", "letheon-api")["spec"]["triggers"]}
QUERIES = [
    *queries_of_the_dashboard(),
    *(rule["expr"] for rule in rules()),
    *(trigger["metadata"]["query"] for trigger in SCALING.values()),
]


@pytest.mark.parametrize("query", QUERIES)
def test_every_query_reads_what_is_exported(query: str, series: dict[str, dict[str, set[str]]]) -> None:
    read = selectors(query)
    assert read
    for selector in read:
        if selector.name in OF_PROMETHEUS:
            continue
        assert selector.name in series
        for matcher in selector.matchers.matchers:
            assert matcher.name in series[selector.name] or matcher.name in TARGET, f"{selector.name}{{{matcher.name}}}"


def test_values_that_are_asked_for_exist(series: dict[str, dict[str, set[str]]]) -> None:
    """A state, an outcome or a route that is misspelt would be a panel that is always empty."""
    for query in QUERIES:
        for name, operator, wanted in re.findall(r'\b(state|outcome|reason|route)(=~?|!=)"([^"]+)"', query):
            known = set().union(*(labels.get(name, set()) for labels in series.values()))
            for value in wanted.split("|") if operator == "=~" else [wanted]:
                assert value in known, query


def test_every_metric_of_ours_is_watched_somewhere(exported: list[Metric]) -> None:
    names = {selector.name for query in QUERIES for selector in selectors(query)}
    for family in exported:
        if family.name.startswith("letheon_") and family.name != "letheon_active_set_prompts":
            assert any(name.startswith(family.name) for name in names), family.name


def test_the_dashboard_is_whole() -> None:
    board = json.loads(GRAFANA.read_text(encoding="utf-8"))
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another panel"
        taken |= cells
        if panel["type"] != "row":
            assert {target["datasource"]["uid"] for target in panel["targets"]} == {"${datasource}"}


def test_every_alert_says_what_happened() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning") and rule["annotations"]["summary"]


def test_the_scrape_is_of_this_service() -> None:
    document = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    [job] = document["scrape_configs"]
    assert job["authorization"] == {"credentials_file": "letheon.key"} and "metrics_path" not in job
    [discovery] = job["dns_sd_configs"]
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    [service] = discovery["names"]
    assert str(discovery["port"]) in compose["services"][service]["command"]  # each replica, not the gateway
    assert document["rule_files"] == ["alerts.yml"]
    assert {selector.matchers.matchers[0].value for selector in selectors(rules()[0]["expr"])} == {job["job_name"]}


def test_each_alert_has_a_case_that_raises_it() -> None:
    """And one that does not."""
    document = yaml.safe_load((PROMETHEUS / "alerts.test.yml").read_text(encoding="utf-8"))
    cases = [case for test in document["tests"] for case in test["alert_rule_test"]]
    names = {rule["alert"] for rule in rules()}
    assert {case["alertname"] for case in cases if case.get("exp_alerts")} == names
    assert {case["alertname"] for case in cases if not case.get("exp_alerts")} == names


@pytest.mark.skipif(PROMTOOL is None, reason="promtool is not installed: the alerts' cases are not run")
def test_the_cases_of_the_alerts_hold() -> None:
    command = [str(PROMTOOL), "test", "rules", "alerts.test.yml"]
    done = subprocess.run(command, cwd=PROMETHEUS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_api_is_scaled_by_what_it_has() -> None:
    """By an average over the replicas, eight would be there only while a text waits for eight seconds."""
    kinds = {name: trigger["metricType"] for name, trigger in SCALING.items()}
    assert kinds == {"oldest-waiting-seconds": "Value", "refused-share": "Value", "calls-per-second": "AverageValue"}
