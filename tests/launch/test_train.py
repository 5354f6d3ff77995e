"""`turnout train` as a user meets it: real processes, real signals, the run's directory and its exit codes."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from turnout import ConfigError
from turnout.configs.typed import build
from turnout.launch import main as cli
from turnout.launch import rundir
from turnout.launch.launcher import environment
from turnout.launch.train import merge, prepare
from turnout.moe.train.config import RunConfig
from turnout.tests.helpers.processes import PARENT, processes_with
from turnout.tests.helpers.runs import TIMEOUT, corpus, fingerprint, rows, run, start, tiny

TURNOUT = ("-m", "turnout", "train")
TORCHRUN = ("-m", "torch.distributed.run")
TRAIN_KEYS = [
    "kind", "step", "tokens", "seconds", "loss", "aux_loss", "aux/balance", "aux/z", "z_loss", "tokens_per_second",
    "mfu", "drop_fraction", "layer_drop_fraction", "moe_layers", "expert_load", "load_max_mean", "load_cv",
    "router_entropy", "dead_experts", "router_logit_norm", "grad_norm", "lr", "all_to_all_bytes", "all_to_all_seconds",
    "all_to_all_under_way", "all_to_all_share",
]  # fmt: skip
EVAL_KEYS = ["kind", "step", "val_loss", "bits_per_byte"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """A run on two expert-parallel ranks that nothing happened to; its output and directory."""
    directory = tmp_path_factory.mktemp("runs") / "whole"
    words = tiny(data, "nproc=2", "parallel.ep=2", f"run={directory}", f"json={directory}.json", "train.steps=12")
    result = run(*TURNOUT, *words)
    assert result.returncode == 0, result.stdout
    return directory, result.stdout


def wait_for(condition, process: subprocess.Popen, what: str) -> None:
    """Poll until `condition()`; fail when the process ends first or time runs out."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        if process.poll() is not None:
            pytest.fail(f"ended before {what}: {process.communicate()[0]}")
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def steps_done(directory: Path) -> int:
    path = directory / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def ranks_of(agent: int) -> list[int]:
    """The processes that a torchrun agent started."""
    return sorted(processes_with(PARENT, agent))


def ending(process: subprocess.Popen) -> tuple[int, str]:
    output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def test_a_run_leaves_what_the_surface_promises(undisturbed):
    directory, output = undisturbed
    names = {path.name for path in directory.iterdir()}
    assert names == {
        "config.yaml", "overrides.json", "metrics.jsonl", "checkpoints", "model", "tokenizer", "plots.png",
        "exit.json", "lock",
    }  # fmt: skip
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    served = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {p.name for p in (directory / "model").iterdir()} == served
    ended = json.loads((directory / "exit.json").read_text())
    assert ended["code"] == 0
    assert [ended["ranks"][rank]["code"] for rank in ("0", "1")] == [0, 0]
    assert build(RunConfig, yaml.safe_load((directory / "config.yaml").read_text())).parallel.ep == 2
    assert "step     12  loss" in output
    assert "eta" in output
    told = json.loads(Path(f"{directory}.json").read_text())
    assert (told["code"], told["step"], told["run"]) == (0, 12, str(directory))
    assert told["bits_per_byte"] == rows(directory, "eval")[-1]["bits_per_byte"]


def test_metrics_rows_have_exactly_the_frozen_keys_and_add_up(undisturbed):
    directory, _ = undisturbed
    trained, held_out = rows(directory), rows(directory, "eval")
    assert [row["step"] for row in trained] == list(range(1, 13))
    for row in trained:
        assert sorted(row) == sorted(TRAIN_KEYS)
        assert row["tokens"] == row["step"] * 4 * 32
        assert row["mfu"] is None
        assert (len(row["expert_load"]), len(row["router_entropy"])) == (1, 1)
        assert sum(row["expert_load"][0]) == pytest.approx(1)
        assert row["aux_loss"] == pytest.approx(0.01 * row["aux/balance"] + 0.001 * row["z_loss"])
        assert 0 <= row["drop_fraction"] < 1
    assert [sorted(row) for row in held_out] == [sorted(EVAL_KEYS)]


def test_a_rank_killed_at_a_random_moment_costs_nothing_but_time(undisturbed, data, tmp_path):
    _killed(undisturbed[0], data, tmp_path, random.Random(7))


@pytest.mark.full
@pytest.mark.parametrize("seed", range(8))
def test_ranks_killed_at_many_moments_cost_nothing_but_time(undisturbed, data, tmp_path, seed):
    _killed(undisturbed[0], data, tmp_path, random.Random(seed))


def _killed(whole: Path, data: Path, tmp_path: Path, chance: random.Random) -> None:
    """Kill -9 one of two ranks somewhere between the first and the last step, resume: the same bits as `whole`."""
    directory = tmp_path / "killed"
    words = tiny(data, "nproc=2", "parallel.ep=2", f"run={directory}", "train.steps=12")
    process = start(*TURNOUT, *words)
    moment = chance.randrange(1, 9)
    wait_for(lambda: steps_done(directory) >= moment, process, "the kill")
    time.sleep(chance.random() * 0.05)
    (agent,) = ranks_of(process.pid)
    os.kill(chance.choice(ranks_of(agent)), signal.SIGKILL)
    code, output = ending(process)
    assert code == 5, output
    ended = json.loads((directory / "exit.json").read_text())
    assert ended["code"] == 5
    assert sorted(ended["ranks"]) == ["0", "1"]
    resumed = run(*TURNOUT, f"train.resume={directory}")
    assert resumed.returncode == 0, resumed.stdout
    assert fingerprint(directory, 12) == fingerprint(whole, 12)
    assert [row["step"] for row in rows(directory)] == list(range(1, 13))
    assert [row["loss"] for row in rows(directory)] == [row["loss"] for row in rows(whole)]


@pytest.mark.parametrize("nproc", [1, pytest.param(2, marks=pytest.mark.full)])
def test_sigterm_saves_at_the_step_boundary_and_ends_with_143(data, tmp_path, nproc):
    directory = tmp_path / "run"
    words = tiny(data, f"nproc={nproc}", f"run={directory}", "train.steps=100000", "train.save_every=null")
    process = start(*TURNOUT, *words)
    wait_for(lambda: steps_done(directory) >= 3, process, "SIGTERM")
    process.send_signal(signal.SIGTERM)
    code, output = ending(process)
    assert code == 143, output
    assert "Traceback" not in output
    ended = json.loads((directory / "exit.json").read_text())
    assert {entry["code"] for entry in ended["ranks"].values()} == {143}
    (saved,) = (directory / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) == rows(directory)[-1]["step"]


@pytest.mark.full
def test_a_second_sigterm_ends_at_once_and_keeps_the_last_commit(data, tmp_path):
    directory = tmp_path / "run"
    process = start(*TURNOUT, *tiny(data, "nproc=2", f"run={directory}", "train.steps=100000"))
    wait_for(lambda: steps_done(directory) >= 3, process, "SIGTERM")
    (agent,) = ranks_of(process.pid)
    for rank in ranks_of(agent):
        os.kill(rank, signal.SIGSTOP)  # no vote will come
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    code, _ = ending(process)
    assert code != 0
    assert not ranks_of(agent)
    assert fingerprint(directory, 2)


def test_settings_that_only_fail_at_run_time_have_their_own_codes(data, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": 3}\n')
    result = run(*TURNOUT, *tiny(broken, f"run={tmp_path / 'data'}"))
    assert result.returncode == 3, result.stdout
    assert "broken.jsonl (line 2)" in result.stdout
    result = run(*TURNOUT, *tiny(data, f"run={tmp_path / 'wild'}", "optim.lr=1e30", "optim.clip=null", "optim=adamw"))
    assert result.returncode == 4, result.stdout
    assert "is not finite" in result.stdout
    assert json.loads((tmp_path / "wild" / "exit.json").read_text())["ranks"]["0"]["code"] == 4


@pytest.mark.full
def test_plain_torchrun_composes_on_rank_0_and_shares_it(undisturbed, data, tmp_path):
    directory = tmp_path / "run"
    words = tiny(data, "parallel.ep=2", f"run={directory}", "train.steps=12", "nproc=null")
    result = run(*TORCHRUN, "--standalone", "--nproc-per-node", "2", "-m", "turnout.launch.train", *words)
    assert result.returncode == 0, result.stdout
    assert fingerprint(directory, 12) == fingerprint(undisturbed[0], 12)
    assert json.loads((directory / "exit.json").read_text())["code"] == 0


def test_two_nodes_meet_at_one_rendezvous(undisturbed, data, tmp_path):
    directory, port = tmp_path / "run", 20000 + os.getpid() % 10000
    words = tiny(data, "parallel.ep=2", f"run={directory}", "train.steps=12", "nproc=null")
    meet = ("--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-id", tmp_path.name)
    command = (*TORCHRUN, "--nnodes", "2", "--nproc-per-node", "1", *meet, "-m", "turnout.launch.train", *words)
    nodes = [start(*command), start(*command)]
    endings = [ending(node) for node in nodes]
    assert [code for code, _ in endings] == [0, 0], endings
    assert fingerprint(directory, 12) == fingerprint(undisturbed[0], 12)
    assert sorted(json.loads((directory / "exit.json").read_text())["ranks"]) == ["0", "1"]


def test_torchrun_by_path_names_the_right_form():
    result = run(str(Path(cli.__file__).with_name("train.py")))
    assert result.returncode == 2
    assert "torchrun ... -m turnout.launch.train" in result.stdout


def test_a_directory_in_use_or_with_checkpoints_is_refused(undisturbed, data, tmp_path, capsys):
    words = tiny(data, f"run={undisturbed[0]}")
    assert cli.main(["train", *words]) == 2
    assert "holds checkpoints already: add train.resume=true" in capsys.readouterr().err
    (tmp_path / "damaged" / "checkpoints" / "quarantine" / "step-00000002").mkdir(parents=True)
    assert cli.main(["train", *tiny(data, f"run={tmp_path / 'damaged'}")]) == 2
    assert "holds checkpoints already" in capsys.readouterr().err
    words = tiny(data, f"run={tmp_path}")
    with rundir.locked(tmp_path):
        assert cli.main(["train", *words]) == 2
    assert f'"pid": {os.getpid()}, "run": "{tmp_path.name}"' in capsys.readouterr().err
    with rundir.locked(tmp_path):
        pass


def test_resume_starts_from_the_words_of_the_run_and_takes_new_ones(data, tmp_path):
    words = tiny(data, f"run={tmp_path}", "optim.lr=0.25")
    composed, kept = prepare(words)
    rundir.freeze(tmp_path, composed.config, kept)
    resumed, _ = prepare([f"train.resume={tmp_path}", "train.steps=9"])
    assert (resumed.run, resumed.config.train.resume) == (str(tmp_path), True)
    assert (resumed.config.optim.lr, resumed.config.train.steps) == (0.25, 9)
    with pytest.raises(ConfigError, match="is not a directory"):
        prepare([f"train.resume={tmp_path / 'nowhere'}"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"is not a run \(overrides\.json is missing\)"):
        prepare([f"train.resume={tmp_path / 'empty'}"])


def test_merge_lets_the_later_word_win():
    assert merge(["a=1", "b=2"], ["b=3", "c=4"]) == ["a=1", "b=3", "c=4"]


def test_the_environment_shares_the_cores_and_respects_what_is_set():
    cores = len(os.sched_getaffinity(0))
    assert environment({}, 1, 10)["OMP_NUM_THREADS"] == str(cores)
    assert environment({}, 10**6, 10)["OMP_NUM_THREADS"] == "1"
    assert environment({"OMP_NUM_THREADS": "7"}, 1, 10)["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(
    ("codes", "whole"),
    [([0, 0], 0), ([143, 143], 143), ([5, 3], 3), ([5, 0], 5), ([5, 143], 5), ([4, 4], 4), ([5, 1], 1), ([], 0)],
)
def test_the_run_s_code_is_the_cause_not_its_effects(codes, whole):
    assert rundir.run_code({str(rank): {"code": code} for rank, code in enumerate(codes)}) == whole


def test_a_rank_without_a_word_was_lost(tmp_path):
    rundir.record_exit(tmp_path, 1, 0, "done")
    assert rundir.conclude(tmp_path, 2, failed=False) == 0
    assert rundir.conclude(tmp_path, 2, failed=True) == 5
    assert "killed" in rundir.read_exit(tmp_path)["ranks"]["0"]["reason"]


def test_the_slurm_script_starts_one_agent_a_node_and_asks_again_when_preempted(tmp_path):
    """With a scheduler made of shell scripts: the command line that srun gets, and the requeue on code 143."""
    script = Path(cli.__file__).with_name("slurm") / "train.sbatch"
    for name, body in {
        "scontrol": 'if [ "$1" = show ]; then echo node1; echo node2; else echo "$@" >> calls; fi',
        "srun": 'echo "$@" >> calls; mkdir -p "$RUN"; echo \'{"code": 143}\' > "$RUN/exit.json"; exit 1',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "7", "JOB_NODELIST": "node[1-2]", "NNODES": "2", "GPUS_ON_NODE": "8", "CPUS_PER_TASK": "64"}
    env = {f"SLURM_{key}": value for key, value in slurm.items()} | {"RUN": "runs/x"}
    env["PATH"] = f"{tmp_path}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(["bash", str(script), "seed=3"], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    started, requeued = (tmp_path / "calls").read_text().splitlines()
    assert "torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint node1:29500" in started
    assert started.endswith("-m turnout.launch.train run=runs/x train.resume=true seed=3")
    assert requeued == "requeue 7"
