"""`turnout plan`: what it shows and writes, what it refuses, and the tables of machines."""

import json
import math
import re
import subprocess
import sys
import time

import pytest

from turnout import ConfigError
from turnout.configs.hardware import ACCELERATORS, NETWORKS, accelerator
from turnout.launch.main import main


def test_the_verb_loads_no_torch_and_writes_what_it_shows(tmp_path):
    words = ["experiment=gshard_pydocs", "world=4", "train.global_batch=64", "accelerator=A100", "network=eth100"]
    code = (
        "import sys; from turnout.launch.main import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", f"{code}; sys.exit(code)", "plan", *words, f"json={tmp_path / 'plan.json'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["world"], plan["ep"], plan["edp"]) == (4, 2, 2)
    assert plan["memory"]["total"] == plan["bytes"] <= plan["worst_bytes"]
    found = {(row["dp"], row["cp"], row["tp"], row["pp"], row["ep"]) for row in plan["layouts"]}
    assert {(4, 1, 1, 1, ep) for ep in (1, 2, 4)} <= found
    assert all(row["world"] == 4 for row in plan["layouts"])
    order = [(not row["fits"], row["seconds"]) for row in plan["layouts"]]
    assert order == sorted(order)
    assert [row["world"] for row in plan["worlds"]] == [1, 2, 8, 16, 32, 64]
    assert plan["time"].keys() >= {"compute", "memory", "exchange", "tensor", "context", "pipeline", "gather", "bubble"}
    assert f"{plan['parameters']['total']:,} total" in result.stdout


def test_layouts_in_which_rows_can_not_travel_as_asked_are_left_out(tmp_path, capsys):
    words = ["world=4", "experiment=gshard_pydocs", "parallel.ep=4", "parallel.node=2", "parallel.chunks=2"]
    assert main(["plan", *words, f"json={tmp_path / 'plan.json'}"]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert {row["ep"] for row in rows if row["world"] == 4} == {2, 4}
    capsys.readouterr()


def test_layouts_that_do_not_fit_are_marked_and_come_last(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("{bfloat16: 1e12, float32: 5e11, memory: 150e6, bandwidth: 1e11, link: 1e9, node: 4}")
    words = ["train.global_batch=4096", "train.micro_batch=4", f"accelerator={path}", f"json={tmp_path / 'plan.json'}"]
    assert main(["plan", "world=8", *words]) == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    rows, worlds = plan["layouts"], plan["worlds"]
    assert {row["world"] for row in worlds} == {2**i for i in range(11)} - {8}
    assert {row["fits"] for row in rows} == {True, False}
    assert all(row["fits"] == (row["bytes"] <= 150e6) for row in rows)
    assert sorted(rows, key=lambda row: not row["fits"]) == rows
    shown = capsys.readouterr().out
    assert "DOES NOT FIT" in shown


@pytest.mark.parametrize("how", ["parallel.dp=2", "parallel=auto"])
def test_compiled_blocks_are_planned_as_if_they_were_not_and_the_plan_says_so(how, capsys):
    shown = []
    for words in ((), ("train.compile=true",)):
        assert main(["plan", "world=2", how, *words]) == 0
        shown.append(capsys.readouterr().out.splitlines())
    line = "train.compile is on: memory and time are those of blocks that are not compiled"
    assert shown[1].count(line) == 1
    assert [other for other in shown[1] if other != line] == shown[0]


def test_thousands_of_ranks_take_a_moment(tmp_path, capsys):
    big = ["model.layers=48", "model.width=4096", "model.heads=32", "model.kv_heads=8", "model.head_dim=128"]
    sizes = ["moe=qwen3_moe", "moe.num_experts=128", "moe.expert_width=1536", "moe.top_k=8", "data.vocab_size=100000"]
    batch = ["train.global_batch=4096", "train.micro_batch=1", "train.seq_len=4096", "model.max_seq_len=4096"]
    started = time.process_time()
    assert main(["plan", *big, *sizes, *batch, "world=4096", f"json={tmp_path / 'plan.json'}"]) == 0
    assert time.process_time() - started < 4
    rows = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert len(rows) > 50
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    left = int(re.search(r"(\d+) more layouts", shown)[1])
    assert len(rows) - 13 <= left <= len(rows) - 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world=0"], "world (0) must be at least 1"),
        (["world=3"], "train.global_batch (8) must be a multiple of the 3 data-parallel ranks: use 6"),
        (["world=2", "world=4"], "world (4) is given twice"),
        (["world=3", "parallel.tp=2"], "parallel.tp (2)"),
        (["world=2", "parallel.ep=4"], "parallel.ep (4) must divide the data-parallel ranks (2)"),
        (["accelerator=H300"], "accelerator (H300) is not a known accelerator and no file"),
        (["network=string"], "network (string) is not a known network and no file"),
        (["moe.num_expert=8"], "did you mean moe.num_experts?"),
        (["worl=8"], "did you mean world?"),
        (["switch"], "has no '='"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_and_exit_code_2(words, message, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory: 1e9", "accelerator.bfloat16 is missing"),
        ("{memory: [", "can not be read as YAML"),
        ("memori: 1", "did you mean accelerator.memory?"),
        ("{bfloat16: 1, float32: 1, memory: 0, bandwidth: 1, link: 1}", "accelerator.memory (0.0) must be positive"),
    ],
    ids=str,
)
def test_a_bad_machine_file_names_its_field(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        accelerator(str(path))
    assert message in str(error.value)


def test_the_tables_hold_plausible_machines():
    for machine in ACCELERATORS.values():
        assert machine.bfloat16 > machine.float32 > machine.bandwidth > machine.link
    assert all(math.isfinite(net.bandwidth) for net in NETWORKS.values())
