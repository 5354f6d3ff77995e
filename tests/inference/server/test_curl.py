"""The curl lines of the documents run as they stand there, but for the address and the model's name."""

import re
import subprocess
from pathlib import Path

import pytest

from turnout.launch.serve import HELP

from .conftest import NAME, Running

ROOT = Path(__file__).parents[3]
FAILING = 'curl() { command curl --fail-with-body --silent --show-error --max-time 60 "$@"; }\n'


def lines() -> list[str]:
    texts = [(ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/serving.md", "docs/api.md")]
    found = [
        line for text in [*texts, HELP] for line in re.findall(r"^\s*(curl [^\\\n]*(?:\\\n[^\\\n]*)*)", text, re.M)
    ]
    assert len(found) >= 6
    return found


@pytest.mark.parametrize("line", lines(), ids=lambda line: line[27:60])
def test_a_line_answers(served: Running, line):
    assert "http://127.0.0.1:8000/" in line
    line = line.replace("http://127.0.0.1:8000", served.url)
    line = re.sub(r'"model": "(NAME|first)"', f'"model": "{NAME}"', line)
    done = subprocess.run(["bash", "-c", FAILING + line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(("{", "data: {"))
    assert "data: [DONE]" in done.stdout or '"error"' not in done.stdout
