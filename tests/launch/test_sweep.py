"""`turnout train -m`: every combination, each a run of its own, refused as a whole before the first starts."""

import json

import pytest
from rich.console import Console

from turnout.launch import main as cli
from turnout.launch import rundir, sweep
from turnout.launch.compose import compose
from turnout.tests.helpers.runs import corpus, rows, run, tiny


def test_the_product_keeps_hydra_s_order_and_grammar():
    words = ["a=1,2", "b=x", "c=range(1,3)", "d='1,2'"]
    assert sweep.product(words) == [
        ["a=1", "b=x", "c=1", "d='1,2'"],
        ["a=1", "b=x", "c=2", "d='1,2'"],
        ["a=2", "b=x", "c=1", "d='1,2'"],
        ["a=2", "b=x", "c=2", "d='1,2'"],
    ]


def test_a_sweep_of_two_runs_both_and_ends_with_a_table(tmp_path):
    data, root = corpus(tmp_path), tmp_path / "sweep"
    words = tiny(data, "train.steps=2", f"run={root}", f"json={tmp_path / 'table.json'}", "optim.lr=0.001,0.01", "-m")
    result = run("-m", "turnout", "train", *words)
    assert result.returncode == 0, result.stdout
    table = json.loads((tmp_path / "table.json").read_text())["runs"]
    assert [(row["optim.lr"], row["step"], row["code"]) for row in table] == [("0.001", 2, 0), ("0.01", 2, 0)]
    for number, lr in enumerate((0.001, 0.01)):
        assert rundir.frozen(root / str(number)).optim.lr == lr
        assert rows(root / str(number))[-1]["lr"] == pytest.approx(lr, rel=0.6)
    assert "bits_per_byte" in result.stdout
    assert "0.001" in result.stdout.splitlines()[-3]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moe.num_experts=8,7", "parallel.ep=2", "nproc=2"], "parallel.ep (2) must divide moe.num_experts (7)"),
        (["seed=1"], "-m has nothing to sweep"),
        (["sed=1,2"], "did you mean seed?"),
        (["optim=adamw,sgd"], "sgd"),
    ],
    ids=str,
)
def test_one_impossible_combination_refuses_the_sweep_and_leaves_nothing(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "-m", *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_table_shows_what_was_swept_and_what_is_missing():
    console = Console(record=True, width=160)
    console.print(sweep.table([{"seed": "3", "step": 2, "loss": 1.23456, "code": 4}], ["seed"]))
    text = console.export_text()
    assert "1.235" in text
    assert " 4 " in text
    assert " - " in text


def test_a_group_can_be_swept():
    assert [compose(words).config.optim.name for words in sweep.product(["optim=adamw,muon"])] == ["adamw", "muon"]
