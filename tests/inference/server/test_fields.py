"""The table of fields in docs/api.md: it is whole, and each row is what the server does."""

import json
import re
from pathlib import Path

import pytest

from turnout.inference.server.protocol import ChatRequest, CompletionRequest

from .conftest import NAME, Running
from .test_bad_input import check_error

PAGE = Path(__file__).parents[3] / "docs" / "api.md"
ENDPOINTS = {
    "completions": ("/v1/completions", CompletionRequest, {"prompt": "x"}),
    "chat": ("/v1/chat/completions", ChatRequest, {"messages": [{"role": "user", "content": "x"}]}),
}


def table() -> list[tuple[str, str, str, str | None, str | None]]:
    """(endpoint, field, standing, accepted, refused) of every row, a row for each field and endpoint; JSON texts."""
    _, _, text = PAGE.read_text(encoding="utf-8").partition("## Fields")
    found = []
    for line in text.splitlines():
        if line.startswith("| `"):
            fields, where, standing, *examples = (cell.strip() for cell in line.strip("|").split(" | "))
            accepted, refused = (example.strip(" |`") or None for example in examples)
            for endpoint in ENDPOINTS if where == "both" else [where]:
                found += [(endpoint, name, standing, accepted, refused) for name in re.findall("`([^`]+)`", fields)]
    return found


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_every_field_has_one_row_that_says_whether_it_is_served(endpoint):
    _, model, _ = ENDPOINTS[endpoint]
    rows = [row for row in table() if row[0] == endpoint]
    assert len(rows) > 60
    assert sorted(row[1] for row in rows) == sorted(model.model_fields.keys() | model.neutral.keys())
    for _, name, standing, _, _ in rows:
        assert standing.startswith("served" if name in model.model_fields else ("neutral", "refused")), name


@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_the_values_of_the_table_are_accepted_and_refused(served: Running, endpoint):
    path, model, body = ENDPOINTS[endpoint]
    for _, name, _, accepted, refused in [row for row in table() if row[0] == endpoint]:
        good = json.loads(accepted.replace("NAME", NAME))
        answer = served.post(path, **({"max_tokens": 2} | body | {name: good}))
        assert answer.status_code == 200, (name, answer.text)
        if refused is None:
            assert 5 in model.neutral[name], "there is nothing that it refuses"
            continue
        error = check_error(served.post(path, **({"max_tokens": 2} | body | {name: json.loads(refused)})), 400)
        assert error["param"].split(".")[0].split("[")[0] == name, error
        assert (error["code"] == "unsupported_parameter") == (name in model.neutral)
