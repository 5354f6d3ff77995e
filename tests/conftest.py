"""What every test run shares: one thread, no network, tiers, and no green by skipping or by collecting nothing.

`pytest` runs the quick tier, `pytest --full` everything but what takes as long as it is given, which `--soak MINUTES`
adds. `--min-tests N` fails a run in which fewer tests passed.
"""

import os

# Before torch and its libraries read them; processes started by tests inherit them.
os.environ.update(
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    WANDB_MODE="offline",
    MPLBACKEND="Agg",
)

import pytest

ALLOWED_SKIPS = ("needs a CUDA GPU",)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the whole matrices too (make test-full)")
    parser.addoption("--soak", type=float, metavar="MINUTES", help="add the nightly tests, each for at least so long")
    parser.addoption("--min-tests", type=int, default=0, help="fail when fewer tests than this passed")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    left_out = {mark for mark in ("full", "soak") if config.getoption(f"--{mark}") in (False, None)}
    dropped = [item for item in items if left_out & {mark.name for mark in item.iter_markers()}]
    if dropped:
        config.hook.pytest_deselected(items=dropped)
        items[:] = [item for item in items if item not in set(dropped)]


def complaints(stats: dict[str, list], minimum: int) -> list[str]:
    """Why a run whose tests all passed is still not good: tests skipped without a reason we allow, or too few run."""
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in stats.get("skipped", [])}
    found = [f"skipped without an allowed reason: {reason}" for reason in sorted(reasons.difference(ALLOWED_SKIPS))]
    passed = len(stats.get("passed", []))
    return found + ([f"{passed} tests passed, at least {minimum} must"] if passed < minimum else [])


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workerinput"):
        return  # one of several processes: the one that collects their results judges
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    found = complaints(reporter.stats, session.config.getoption("--min-tests"))
    for line in found:
        reporter.write_line(f"NOT ACCEPTED: {line}", red=True)
    if found and exitstatus == 0:
        session.exitstatus = 1
