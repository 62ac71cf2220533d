"""The dashboard in deploy/grafana: Prometheus can read each query, /metrics has what they ask for, and no panel hides another."""

import json
import re
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import requests
from prometheus_client.parser import text_string_to_metric_families

from tests.contract.running import fake_config, running_server

DASHBOARD: dict[str, Any] = json.loads((Path(__file__).parents[2] / "deploy" / "grafana" / "vlm-server.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [target["expr"] for panel in PANELS for target in panel["targets"]]
SCRAPER_LABELS = {"instance", "job"}  # Prometheus itself adds them

_SUFFIXES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}


@pytest.fixture(scope="module")
def labels() -> dict[str, set[str]]:
    """The labels of everything on a page of a server that was asked and has refused; no entry for what is not there."""
    key = {"Authorization": "Bearer k"}
    with running_server(fake_config(api_keys=("k",))) as server:
        for fields in ({}, {"n": 0}):
            body = {"model": server.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 3, **fields}
            requests.post(f"{server.url}/v1/chat/completions", json=body, headers=key, timeout=10)
        page = requests.get(f"{server.url}/metrics", headers=key, timeout=10).text
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for suffix in _SUFFIXES.get(family.type, ()):
            found[family.name + suffix] = set()
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def filled(query: str) -> str:
    """With values in place of Grafana's variables."""
    return query.replace("$__rate_interval", "5m").replace("$instance", ".*")


@pytest.mark.parametrize("query", QUERIES)
def test_prometheus_can_read_a_query(query: str) -> None:
    assert "$" not in filled(query)
    promql_parser.parse(filled(query))


def test_a_query_with_a_mistake_would_be_found() -> None:
    with pytest.raises(ValueError):
        promql_parser.parse("sum(rate(vlm:x[5m])")


@pytest.mark.parametrize("query", QUERIES)
def test_metrics_has_what_a_query_asks_for(labels: dict[str, set[str]], query: str) -> None:
    names = set(re.findall(r"vlm:\w+", query))

    assert names
    assert names <= set(labels)
    grouped = {name.strip() for group in re.findall(r"by \(([^)]*)\)", query) for name in group.split(",")} - SCRAPER_LABELS
    chosen = set(re.findall(r"[{,](\w+)=", query)) - SCRAPER_LABELS
    for name in names:
        assert labels[name] == set() or grouped | chosen <= labels[name], name


@pytest.mark.parametrize("panel", PANELS, ids=[panel["title"] for panel in PANELS])
def test_a_panel_says_what_it_shows_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert [target["refId"] for target in panel["targets"]] == [chr(ord("A") + index) for index in range(len(panel["targets"]))]
    assert all('instance=~"$instance"' in target["expr"] for target in panel["targets"])
    for target in panel["targets"]:
        named = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
        assert named <= {name.strip() for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for name in group.split(",")}


def test_no_panel_lies_on_another_or_leaves_the_page() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells

    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_the_variables_are_those_that_the_panels_use(labels: dict[str, set[str]]) -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}

    assert set(variables) == {"datasource", "instance"}
    [name] = re.findall(r"vlm:\w+", variables["instance"]["query"]["query"])
    assert name in labels
