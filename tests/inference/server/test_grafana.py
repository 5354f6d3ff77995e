"""The dashboard shows what a server has, all of it and nothing else."""

import json
import re
from itertools import combinations
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from .conftest import Running

ADDED = {"instance", "le"}
"""Labels that Prometheus gives, or that stand at buckets only."""


@pytest.fixture(scope="module")
def board() -> dict:
    path = Path(__file__).parents[3] / "launch" / "grafana" / "turnout.json"
    return json.loads(path.read_text(encoding="utf-8"))


def queries(board: dict) -> list[str]:
    variables = [each["definition"] for each in board["templating"]["list"] if each["type"] == "query"]
    return variables + [target["expr"] for panel in board["panels"] for target in panel.get("targets", ())]


def test_every_metric_of_a_running_server_is_in_it_and_no_other(served: Running, board):
    served.post(prompt="The list", max_tokens=3)
    served.get("/health")
    families = list(text_string_to_metric_families(served.get("/metrics").text))
    labels = {sample.name: set(sample.labels) for family in families for sample in family.samples}
    shown = set()
    for query in queries(board):
        names = re.findall(r"turnout:\w+", query)
        assert names, query
        assert set(names) <= labels.keys(), query
        shown |= set(names)
        asked = re.findall(r'(\w+)=~?"', query)
        asked += [name for words in re.findall(r"(?:by|ignoring) \((.*?)\)", query) for name in words.split(", ")]
        for name in names:
            assert set(asked) <= labels[name] | ADDED, query
    own = [family for family in families if not family.name.endswith("_created")]
    missing = [family.name for family in own if not any(sample.name in shown for sample in family.samples)]
    assert missing == []


def test_its_panels_have_a_place_of_their_own_and_follow_the_choices(board):
    places = [panel["gridPos"] for panel in board["panels"]]
    for a, b in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"] or a["y"] + a["h"] <= b["y"]
        assert apart or b["y"] + b["h"] <= a["y"], (a, b)
    assert all(place["x"] + place["w"] <= 24 for place in places)
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    assert {"datasource", "instance", "model"} <= {variable["name"] for variable in board["templating"]["list"]}
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            assert target["expr"].count("{") == target["expr"].count('instance=~"$instance", model_name=~"$model"')
