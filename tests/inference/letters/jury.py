"""Runs a test under a mutant, in a process forked after everything but the package itself was imported.

A program of its own, `python jury.py`: a line of JSON in ({"test", "file", "old", "new"}), a line out: what the test's
failures were, by type, and the output of its run.
"""

import json
import os
import signal
import sys
import tempfile

SECONDS = 120
PRELOAD = ("torch", "numpy", "hypothesis", "tokenizers", "httpx", "openai", "starlette", "uvicorn", "pydantic")


class Recorder:
    """The types of all failures."""

    def __init__(self):
        self.failures = []

    def pytest_exception_interact(self, node, call, report):
        self.failures.append(call.excinfo.type.__name__)


def judge(test, mutant):
    """Run one test with one mistake, in this process; returns the types of its failures."""
    import pytest
    import sitecustomize

    os.environ["TURNOUT_MUTANT"] = json.dumps(mutant)
    sitecustomize.install()
    recorder = Recorder()
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
    pytest.main([test, "-x", "--full", *quiet], plugins=[recorder])
    return recorder.failures


def forked(case):
    """`judge` in a child, which is ended after `SECONDS`."""
    with tempfile.TemporaryFile("w+") as log, tempfile.TemporaryFile("w+") as result:
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            signal.alarm(SECONDS)
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            result.write(json.dumps(judge(case.pop("test"), case)))
            result.flush()
            os._exit(0)
        os.waitpid(child, 0)
        for file in (log, result):
            file.seek(0)
        return {"failures": json.loads(result.read() or "[]"), "log": log.read()[-4000:]}


def main():
    for name in PRELOAD:
        __import__(name)
    for line in sys.stdin:
        print(json.dumps(forked(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
