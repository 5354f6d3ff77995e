"""A run starts without torch's compiler and its algebra, which would take as long as all else."""

import subprocess
import sys

import pytest

from turnout.tests.helpers.runs import corpus, tiny

RUN = """
import sys
from pathlib import Path
from turnout.launch import rank
from turnout.launch.compose import compose
path, *words = sys.argv[1:]
code = rank.main(Path(path), compose(words, world=1).config, launched=False)
print("code", code, "imported", *sorted({"torch._dynamo", "sympy", "torch.distributed.fsdp"}.intersection(sys.modules)))
"""


@pytest.mark.parametrize(
    "words",
    [
        ["optim=muon", "moe=switch", "moe.num_experts=4"],
        pytest.param(["optim=adamw", "optim.state_dtype=bfloat16"], marks=pytest.mark.full),
        pytest.param(["optim=adafactor"], marks=pytest.mark.full),
    ],
    ids=" ".join,
)
def test_a_run_does_not_import_the_compiler(tmp_path, words):
    (tmp_path / "run").mkdir()
    words = tiny(corpus(tmp_path), "train.steps=1", *words)
    command = [sys.executable, "-c", RUN, str(tmp_path / "run"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["code 0 imported"], done.stdout + done.stderr
