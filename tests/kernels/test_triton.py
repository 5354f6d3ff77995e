"""Triton kernels, interpreted in a process of their own: an interpreted kernel can not be compiled any more."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_interpreted_kernels_agree_with_the_references(pytestconfig):
    command = [sys.executable, "-m", "pytest", str(HERE / "triton"), "-p", "no:cacheprovider", "--min-tests", "120"]
    command += ["--full"] if pytestconfig.getoption("--full") else []
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout + done.stderr
