"""`turnout bench`: every measure runs on a small model, prints a table and writes what it printed."""

import json

import pytest

from turnout import ConfigError
from turnout.launch.bench import main
from turnout.launch.benches import ceilings
from turnout.tests.inference.conftest import byte_level, model, model_dir  # noqa: F401  (fixtures)

ENGINE = ("engine.num_blocks=60", "engine.max_num_seqs=4", "engine.max_num_batched_tokens=32")


def bench(folder, what, path, *settings):
    assert main([what, str(path), f"json={folder / 'found.json'}", f"plot={folder / 'found.png'}", *settings]) == 0
    assert (folder / "found.png").read_bytes().startswith(b"\x89PNG")
    return json.loads((folder / "found.json").read_text())["rows"]


def test_offline_compares_the_ways_on_one_workload(tmp_path, model_dir, capsys):  # noqa: F811
    jobs = {"requests": [{"prompt_ids": [1 + i, 2, 3] * 8, "out": 4 + i} for i in range(6)], "arrivals_unit": [0] * 6}
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    settings = ("vary=batching,kv_layout", "rounds=2", f"workload={tmp_path / 'jobs.json'}", *ENGINE)
    rows = bench(tmp_path, "offline", model_dir, *settings)
    assert [(row["batching"], row["kv_layout"]) for row in rows][:3] == [
        ("continuous", "paged"),
        ("continuous", "contiguous"),
        ("static", "paged"),
    ]
    assert {row["output_tokens"] for row in rows} == {sum(range(4, 10))}
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(rows) == 7
    assert "tokens_per_second" in lines[0]


def test_the_shipped_text_is_the_workload_of_every_model(tmp_path, model_dir):  # noqa: F811
    (row,) = bench(tmp_path, "offline", model_dir, "requests=1", "engine.num_blocks=40")
    assert row["requests"] == 1


def test_scheduler_and_determinism_are_measured_step_by_step(tmp_path, model_dir):  # noqa: F811
    rows = bench(tmp_path, "scheduler", model_dir, "running=2,4", "steps=4", *ENGINE)
    assert [row["running"] for row in rows] == [2, 4]
    assert all(0 < row["scheduler_ms"] < row["step_ms"] and 0 < row["share"] < 1 for row in rows)
    rows = bench(tmp_path, "deterministic", model_dir)
    assert [row["step"] for row in rows] == ["prefill of 256", "decode of 8"]


def test_kernels_and_the_layer_are_held_against_the_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ceilings, "BYTES", 1 << 20)
    monkeypatch.setattr(ceilings, "SIDE", 64)
    for what, settings in (("kernels", ("ops=rms_norm",)), ("moe", ("shape=qwen3moe-mini", "experts=4", "tokens=1"))):
        args = [what, f"json={tmp_path / 'x.json'}", f"plot={tmp_path / 'x.png'}", "rounds=1", *settings]
        assert main(args) == 0
        found = json.loads((tmp_path / "x.json").read_text())
        assert found["ceilings"]["read"] > 0
        assert all(row["of the ceiling"] > 0 and row["ms"] > 0 for row in found["rows"] if "note" not in row)
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
        assert "this machine: " in capsys.readouterr().out


@pytest.mark.parametrize(
    "args",
    [
        ["speed", "x"], ["offline", "x", "vary=seed"], ["offline", "x", "rounds=0"], ["offline"], ["kernels", "x"],
        ["kernels", "ops=softmax"], ["moe", "shape=huge"], ["moe", "tokens=0"],
    ],
)  # fmt: skip
def test_what_can_not_be_measured_is_said(args):
    with pytest.raises(ConfigError, match="use"):
        main(args)
