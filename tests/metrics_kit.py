"""Reading what Prometheus would read, shared by the tests of the metrics."""

from __future__ import annotations

from collections.abc import Mapping

from api_kit import Api
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(api: Api, headers: Mapping[str, str]) -> Samples:
    """All samples of one scrape by name and labels, each there once."""
    response = api.client.get("/metrics", headers=dict(headers))
    assert response.status_code == 200, response.text
    found: Samples = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found, f"{key} is exported twice"
            found[key] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, frozenset(labels.items())]


def by_label(samples: Samples, name: str, label: str) -> dict[str, float]:
    """Values of a metric with this one label."""
    return {dict(labels)[label]: found for (sample, labels), found in samples.items() if sample == name}
