"""A run can not be green by running nothing or by skipping."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from turnout.tests.helpers.forks import ends, start
from turnout.tests.helpers.ranks import run_ranks

TESTS = """
import pytest

def test_passes(): pass

@pytest.mark.full
def test_matrix(): pass
"""
SKIP = """
@pytest.mark.skipif(True, reason="{reason}")
def test_skipped(): pass
"""


@pytest.fixture
def run(root, tmp_path):
    """Run pytest with our conftest on a file of tests: (exit code, output)."""
    shutil.copy(root / "tests" / "conftest.py", tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = full\n")

    def pytest_on(text: str, *arguments: str) -> tuple[int, str]:
        (tmp_path / "test_it.py").write_text(text)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        return result.returncode, result.stdout

    return pytest_on


def test_the_matrices_run_only_when_asked(run):
    code, output = run(TESTS)
    assert code == 0
    assert re.search(r"1 passed, 1 deselected", output)
    code, output = run(TESTS, "--full")
    assert code == 0
    assert re.search(r"2 passed", output)


def test_too_few_tests_fail_the_run(run):
    code, output = run(TESTS, "--min-tests", "2")
    assert code == 1
    assert "NOT ACCEPTED: 1 tests passed, at least 2 must" in output


def test_a_skip_needs_a_reason_that_is_allowed(run):
    code, output = run(TESTS + SKIP.format(reason="flaky today"))
    assert code == 1
    assert "skipped without an allowed reason: flaky today" in output
    assert run(TESTS + SKIP.format(reason="needs a CUDA GPU"))[0] == 0


def test_the_makefile_asks_for_a_minimum(root):
    minimum = re.search(r"^MIN_TESTS := (\d+)", (root / "Makefile").read_text(), re.MULTILINE)
    assert int(minimum[1]) >= 200


def test_processes_find_a_function_wherever_the_checkout_lies(tmp_path):
    """A folder that is no identifier (`check-out/`) makes pytest name its modules so that nobody can import them."""
    path = tmp_path / "check-out" / "test_it.py"
    path.parent.mkdir()
    path.write_text("def seven():\n    return 7\n")
    spec = importlib.util.spec_from_file_location("nowhere.test_it", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert ends([start(module.seven)]) == [7]
    assert run_ranks(module.seven, 1) == [7]
