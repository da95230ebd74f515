# SPDX-License-Identifier: Apache-2.0
"""The example of Prometheus and Grafana asks for nothing that a server does not have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from fairkv_sglang.control.metrics import METRICS, PREFIX

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "monitoring"
DASHBOARD = FOLDER / "fairkv-dashboard.json"
NAMES = {PREFIX + name + ("_total" if kind == "counter" else ""): kind for name, kind, _ in METRICS}
# SGLang's labels of a rank (metrics_collector.py), and what Prometheus adds
LABELS = {
    "model_name",
    "engine_type",
    "tp_rank",
    "dp_rank",
    "pp_rank",
    "moe_ep_rank",
    "instance",
    "job",
}


def _dashboard() -> dict[str, Any]:
    data = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def _queries(dashboard: dict[str, Any]) -> list[str]:
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [v["definition"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    notes = [note["expr"] for note in dashboard["annotations"]["list"]]
    return [*panels, *variables, *notes]


def test_queries_name_metrics_that_exist() -> None:
    queries = _queries(_dashboard())
    named = {name for query in queries for name in re.findall(r"[a-z]+:\w+", query)}
    assert named <= NAMES.keys()
    assert named == NAMES.keys(), "a metric that nobody looks at"


def test_page_lists_every_metric() -> None:
    page = (FOLDER.parents[1] / "docs" / "monitoring.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| (`.*`) \| (gauge|counter) \|", page, re.M)
    found = {
        PREFIX + name: kind for names, kind in listed for name in re.findall(r"`(\w+)`", names)
    }
    assert found == NAMES


def test_counters_are_asked_for_rates_and_gauges_are_not() -> None:
    for query in _queries(_dashboard()):
        for name in re.findall(r"[a-z]+:\w+", query):
            ranges = re.search(rf"(\w*)\({name}\{{[^}}]*\}}\[", query)
            counted = ranges is not None and ranges[1] in {"rate", "increase", "changes"}
            assert counted == (NAMES[name] == "counter"), query


def test_queries_are_whole_and_use_known_labels() -> None:
    for query in _queries(_dashboard()):
        for opening, closing in ("()", "{}", "[]"):
            assert query.count(opening) == query.count(closing), query
        groups = re.findall(r"(?:by|on) \(([^)]*)\)", query)
        labels = {label.strip() for group in groups for label in group.split(",")}
        labels |= set(re.findall(r"(\w+)=~?\"", query))
        assert labels <= LABELS, query


def test_panels_neither_overlap_nor_share_an_id() -> None:
    panels = _dashboard()["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & own and max(x for x, _ in own) < 24, panel["title"]
        cells |= own


def test_compose_mounts_files_that_exist() -> None:
    compose = yaml.safe_load((FOLDER / "docker-compose.yml").read_text(encoding="utf-8"))
    mounted: dict[str, str] = {}
    for service in compose["services"].values():
        for source, target in (volume.split(":")[:2] for volume in service["volumes"]):
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
                mounted[target] = source
            else:
                assert source in compose["volumes"]
        assert re.fullmatch(r"[\w/]+:v?\d+\.\d+\.\d+", service["image"]), "pinned"
    (provider,) = _yaml("grafana/dashboards/fairkv.yml")["providers"]
    home = compose["services"]["grafana"]["environment"][
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"
    ]
    assert home in mounted and home.startswith(provider["options"]["path"])


def test_prometheus_and_grafana_fit_together() -> None:
    (scrape,) = _yaml("prometheus.yml")["scrape_configs"]
    assert scrape["metrics_path"] == "/metrics"
    assert scrape["static_configs"][0]["targets"] == ["127.0.0.1:30000"]  # SGLang's default port
    (source,) = _yaml("grafana/datasources/prometheus.yml")["datasources"]
    compose = (FOLDER / "docker-compose.yml").read_text(encoding="utf-8")
    assert source["url"].removeprefix("http://") in compose
    assert (
        source["jsonData"]["timeInterval"] == _yaml("prometheus.yml")["global"]["scrape_interval"]
    )


def _yaml(name: str) -> dict[str, Any]:
    data = yaml.safe_load((FOLDER / name).read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data
