"""The dashboard and the alerts of ``deploy/monitoring`` load, and name metrics and labels that a server has."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import grpc
import promql_parser
import pytest
import yaml

from tests.server.fake_predictor import connect, fake_server, predict_request, receive_file
from tests.server.small_models import TINY

FOLDER = Path(__file__).resolve().parents[2] / "deploy" / "monitoring"
DASHBOARD = json.loads((FOLDER / "dashboard.json").read_text())
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yaml").read_text())["groups"] for rule in group["rules"]]
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
SCRAPED = {"job", "instance"}
"""Labels that Prometheus adds itself."""


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """The labels of each metric of a server that has answered a few calls."""
    known: dict[str, set[str]] = defaultdict(set)
    with fake_server(tmp_path_factory.mktemp("server")) as server, connect(server) as stub:
        receive_file(stub.PredictWeights(predict_request(TINY)))
        with pytest.raises(grpc.RpcError):
            receive_file(stub.PredictWeights(predict_request(b"")))
        for family in server.metrics.registry.collect():
            for sample in family.samples:
                known[sample.name] |= {*sample.labels}
    return known


def expressions() -> list[str]:
    """All queries, with Grafana's variables replaced."""
    queries = [query.replace("$__rate_interval", "5m").replace("$job", ".*") for query in QUERIES]
    return [*queries, *(rule["expr"] for rule in RULES)]


@pytest.mark.parametrize("expression", expressions())
def test_queries_are_promql_over_metrics_of_the_server(expression: str, labels: dict[str, set[str]]) -> None:
    promql_parser.parse(expression)
    names = set(re.findall(r"\b(?:ghn|process)_\w+", expression))
    assert names
    assert names <= set(labels)
    wanted = {first or second for first, second in re.findall(r"(\w+)=~?\"|(\w+)!=", expression)}
    for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression):
        wanted |= {label.strip() for label in group.split(",")}
    known = set.union(SCRAPED, *(labels[name] for name in names))
    assert wanted <= known


def test_panels_are_whole() -> None:
    assert DASHBOARD["title"]
    assert DASHBOARD["uid"]
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, width, height = (panel["gridPos"][key] for key in "xywh")
        cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
        assert x + width <= 24
        assert not cells & taken
        taken |= cells
    variables = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD["panels"]))) - {"__rate_interval"}
    assert used <= variables


def test_alerts_say_what_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert set(rule["annotations"]) == {"summary", "action"}


def test_every_metric_is_documented_with_its_labels(labels: dict[str, set[str]]) -> None:
    rows = [line for line in (FOLDER.parents[1] / "docs" / "server.md").read_text().splitlines() if "`ghn_" in line]
    for name in filter(lambda name: name.startswith("ghn_"), labels):
        stem = re.sub(r"_(bucket|sum|count|created)$", "", name)
        row = next((row for row in rows if f"`{stem}`" in row or f"`{stem}_total`" in row), "")
        assert row, name
        assert all(f"`{label}`" in row for label in labels[name] - {"le"}), name
