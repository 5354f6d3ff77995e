"""The README's first command does the whole job, and a check that fails is a failure that shows."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from turnout.launch.quickstart import FULL, PROMPTS, QUICK, QuickstartOptions, conclude, judge

ROOT = Path(__file__).parents[2]

TRAIN_ROW = {
    "kind", "step", "tokens", "seconds", "loss", "aux_loss", "aux/balance", "aux/z", "z_loss", "grad_norm", "lr",
    "tokens_per_second", "mfu", "drop_fraction", "layer_drop_fraction", "moe_layers", "expert_load", "load_max_mean",
    "load_cv", "router_entropy", "dead_experts", "router_logit_norm", "all_to_all_bytes", "all_to_all_seconds",
    "all_to_all_share", "all_to_all_under_way",
}  # fmt: skip
EVAL_ROW = {"kind", "step", "val_loss", "bits_per_byte"}


def test_a_check_that_fails_is_shown_as_failed(capsys, tmp_path):
    report = {
        "loss": 3.0,
        "shuffled_loss": 3.001,
        "bits_per_byte": 2.5,
        "markov": {"bits_per_byte": {"2": 2.71, "5": 1.77}},
    }
    quick, full = judge(report, QUICK), judge(report, FULL)
    assert [check.passed for check in quick] == [True, False]
    assert [check.passed for check in full] == [False, False]
    conclude(tmp_path, 12.0, full)
    text = capsys.readouterr().out
    assert re.search(r"^FAILED .*order 5: 2\.500 against 1\.770", text, re.MULTILINE)
    assert re.search(r"^FAILED .*the experts do something", text, re.MULTILINE)


def test_every_option_is_in_the_help():
    from turnout.launch.quickstart import HELP

    assert all(f"{name}=" in HELP for name in vars(QuickstartOptions()))


@pytest.fixture(scope="module")
def quickstart():
    """The output and the run of `make quickstart QUICK=1`, as the README says it."""
    result = subprocess.run(["make", "quickstart", "QUICK=1"], cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    run = ROOT / re.search(r"^run (\S+)$", result.stdout, re.MULTILINE)[1]
    yield result.stdout, run
    shutil.rmtree(run)


def test_make_quickstart_trains_shows_evaluates_serves_and_sums_up(quickstart):
    output, run = quickstart
    assert re.findall(r"^\[(\d)/5\]", output, re.MULTILINE) == ["1", "2", "3", "4", "5"]
    assert re.search(r"^step +\d+ .*loss .*tok/s .*drop .*load max/mean .*eta", output, re.MULTILINE)
    for name in ("config.yaml", "metrics.jsonl", "plots.png", "checkpoints", "model/model.safetensors"):
        assert (run / name).exists(), name
    summary = json.loads((run / "quickstart.json").read_text())
    assert [check["passed"] for check in summary["checks"]] == [True, True]
    streams = summary["serving"]["streams"]
    assert [stream["prompt"] for stream in streams] == list(PROMPTS)
    assert all(stream["tokens"] == QUICK.max_tokens or stream["finish_reason"] == "stop" for stream in streams)
    assert len({stream["text"] for stream in streams}) == len(PROMPTS)
    assert all(f"[{i}] {prompt}" in output for i, prompt in enumerate(PROMPTS))
    assert summary["serving"]["ttft_ms"]["p50"] > 0
    assert "stopped" in (run / "serve.log").read_text()


def test_the_metrics_have_exactly_the_promised_names(quickstart):
    _, run = quickstart
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    train, held_out = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    assert all(row.keys() == TRAIN_ROW for row in train)
    assert all(row.keys() == EVAL_ROW for row in held_out)
    assert all(abs(sum(load) - 1) < 1e-6 for row in train for load in row["expert_load"])


def test_a_command_that_the_quickstart_suggests_works(quickstart):
    output, run = quickstart
    command = re.search(r"^  turnout generate (\S+) (prompt=\"(.*)\")$", output, re.MULTILINE)
    assert ROOT / command[1] == run
    result = subprocess.run(
        [sys.executable, "-m", "turnout", "generate", str(run), f"prompt={command[3]}", "max_tokens=8"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip()) > 0


def test_the_model_of_the_quickstart_evaluates_from_the_command_line(quickstart, tmp_path):
    _, run = quickstart
    command = [sys.executable, "-m", "turnout", "evaluate", run, "max_bytes=20000", f"json={tmp_path / 'out.json'}"]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert 0 < found["bits_per_byte"] < 8
    assert f"{found['bits_per_byte']:.3f}" in result.stdout
