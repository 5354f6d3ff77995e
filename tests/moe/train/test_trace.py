"""What the routers decided is on disk, whole; a replay takes exactly that at any layout, or says what differs."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from turnout import DataError
from turnout.launch.compose import compose
from turnout.moe.train.loop import train
from turnout.moe.train.trace import read_trace
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, rows, tiny

STEPS = 3
WORDS = ("moe=gshard", "moe.capacity_factor=0.7", f"train.steps={STEPS}", "moe.trace=true")
# Other first weights of the router, other noise, another rule for the second expert: nothing would be decided alike.
OTHER = ("moe.init_scale=2.0", "moe.jitter=0.5", "moe.second_policy=all", "moe.capacity_factor=2.0")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def traced(data, tmp_path_factory):
    """A run at one rank with its trace, evaluated after every step."""
    run = tmp_path_factory.mktemp("traced")
    go(str(run), tiny(data, *WORDS, "train.eval_every=1", "train.eval_bytes=500"))
    return run


def go(run: str, words: list[str]) -> None:
    """Train as this rank of however many there are."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    train(config, Path(run), build_mesh(config.parallel, "cpu", config.model.moe.num_experts), lambda: False)


def complaint(run: str, words: list[str]) -> str:
    """What a run that can not replay says, on this rank."""
    with pytest.raises(DataError) as error:
        go(run, words)
    return str(error.value)


def same(run: Path, other: Path, *parts: str) -> bool:
    """Whether two runs decided alike in every step, by `parts`."""
    for step in range(STEPS):
        ours, theirs = read_trace(run, step), read_trace(other, step)
        assert torch.equal(ours["index"], theirs["index"])
        assert ours["layers"].keys() == theirs["layers"].keys()
        for layer, decided in ours["layers"].items():
            if not all(torch.equal(decided[part], theirs["layers"][layer][part]) for part in parts):
                return False
    return True


def test_a_trace_holds_every_token_of_every_step_once_and_no_evaluation(traced):
    seen = set()
    for step in range(STEPS):
        trace = read_trace(traced, step)
        assert trace["index"].shape == trace["tokens"].shape == (4 * 32,)
        assert (trace["index"].diff() > 0).all()
        assert not seen & set(trace["index"].tolist())
        seen |= set(trace["index"].tolist())
        assert list(trace["layers"]) == [1]
        decided = trace["layers"][1]
        assert {name: (part.dtype, tuple(part.shape)) for name, part in decided.items()} == {
            "ids": (torch.int64, (128, 2)),
            "wanted": (torch.bool, (128, 2)),
            "kept": (torch.bool, (128, 2)),
            "weights": (torch.float32, (128, 2)),
        }
        assert not (decided["kept"] & ~decided["wanted"]).any()
        assert decided["wanted"][:, 0].all()
        assert not decided["wanted"].all(), "some second choices are not drawn"
        assert (decided["wanted"] & ~decided["kept"]).any(), "something is dropped"
        assert torch.allclose(decided["weights"].sum(1), torch.ones(128))
    with pytest.raises(DataError, match=rf"has no step {STEPS}"):
        read_trace(traced, STEPS)


def test_the_files_are_as_documented(traced):
    assert json.loads((traced / "routing" / "index.json").read_text()) == {
        "layers": [1], "experts": 8, "top_k": 2, "router": "gshard",
    }  # fmt: skip
    files = sorted(p.relative_to(traced / "routing").as_posix() for p in (traced / "routing").glob("*/*"))
    assert files == [f"step-{step:08d}/rank-00000.safetensors" for step in range(STEPS)]
    tensors = load_file(traced / "routing" / files[0])
    assert {name: tensor.dtype for name, tensor in tensors.items()} == {
        "index": torch.int64, "tokens": torch.int32, "layers.1.ids": torch.uint8, "layers.1.wanted": torch.bool,
        "layers.1.kept": torch.bool, "layers.1.weights": torch.float32,
    }  # fmt: skip


def test_the_tokens_are_the_text_and_their_loads_the_metrics(traced):
    for step, row in enumerate(rows(traced)):
        decided = read_trace(traced, step)["layers"][1]
        counts_E = decided["ids"][decided["wanted"]].bincount(minlength=8)
        assert row["expert_load"][0] == pytest.approx((counts_E / counts_E.sum()).tolist())


def test_a_replay_takes_exactly_the_traced_decisions(data, traced, tmp_path):
    go(str(tmp_path / "free"), tiny(data, *WORDS, *OTHER))
    assert not same(traced, tmp_path / "free", "ids")
    for name, words in (("whole", []), ("accumulated", ["train.micro_batch=1"])):
        go(str(tmp_path / name), tiny(data, *WORDS, *OTHER, *words, f"moe.replay={traced}"))
        assert same(traced, tmp_path / name, "ids", "wanted", "kept")
        assert not same(traced, tmp_path / name, "weights"), "weights are computed anew, with their gradients"


def test_a_replay_of_the_same_run_is_the_same_run(data, traced, tmp_path):
    words = tiny(data, *WORDS, f"moe.replay={traced / 'routing'}")
    go(str(tmp_path / "run"), words)
    assert same(traced, tmp_path / "run", "ids", "wanted", "kept", "weights")
    assert [row["loss"] for row in rows(tmp_path / "run")] == [row["loss"] for row in rows(traced)]


def test_a_replay_balances_by_the_experts_asked_before_a_reroute(data, tmp_path):
    words = tiny(data, *WORDS, "moe=switch", "moe.reroute=3")
    go(str(tmp_path / "run"), words)
    decided = read_trace(tmp_path / "run", 0)["layers"][1]
    moved_T1 = decided["ids"] != decided["asked"]
    assert moved_T1.any()
    assert decided["kept"][moved_T1].all()
    go(str(tmp_path / "replay"), [*words, "moe.jitter=0.5", "moe.init_scale=2.0", f"moe.replay={tmp_path / 'run'}"])
    assert same(tmp_path / "run", tmp_path / "replay", "ids", "asked", "wanted", "kept")


def test_traces_travel_between_one_rank_and_two(data, traced, tmp_path):
    two = tmp_path / "two"
    run_ranks(go, 2, str(two), tiny(data, *WORDS, *OTHER, "parallel.ep=2", f"moe.replay={traced}"))
    assert len(list((two / "routing" / "step-00000000").iterdir())) == 2
    assert same(traced, two, "ids", "wanted", "kept")
    go(str(tmp_path / "one"), tiny(data, *WORDS, f"moe.replay={two}", "train.micro_batch=2"))
    assert same(traced, tmp_path / "one", "ids", "wanted", "kept")


def test_ranks_that_divide_a_rows_tokens_trace_each_token_once(data, traced, tmp_path):
    two = tmp_path / "two"
    run_ranks(go, 2, str(two), tiny(data, *WORDS, *OTHER, "parallel.cp=2", f"moe.replay={traced}"))
    assert len(load_file(two / "routing" / "step-00000000" / "rank-00001.safetensors")["index"]) == 64
    assert same(traced, two, "ids", "wanted", "kept")


def test_stages_hold_other_layers_of_the_same_tokens(tmp_path):
    place = tmp_path / "step-00000000"
    place.mkdir()
    (tmp_path / "index.json").write_text("{}")
    held = {
        0: ([3, 1], "layers.1.ids"),
        1: ([2], "layers.1.ids"),
        2: ([2, 1], "layers.3.ids"),
        3: ([3], "layers.3.ids"),
    }
    for rank, (tokens, layer) in held.items():
        index = torch.tensor(tokens)
        tensors = {"index": index, "tokens": index.int() * 10, layer: (index * int(layer[7]))[:, None].to(torch.uint8)}
        save_file(tensors, place / f"rank-{rank:05d}.safetensors", metadata={"ranks": "4"})
    trace = read_trace(tmp_path, 0)
    assert (trace["index"].tolist(), trace["tokens"].tolist()) == ([1, 2, 3], [10, 20, 30])
    assert {layer: parts["ids"].tolist() for layer, parts in trace["layers"].items()} == {
        1: [[1], [2], [3]],
        3: [[3], [6], [9]],
    }
    save_file(tensors | {"index": torch.tensor([1])}, place / "rank-00003.safetensors", metadata={"ranks": "4"})
    with pytest.raises(DataError, match=r"layers\.3\.ids of some tokens only"):
        read_trace(tmp_path, 0)


def edited(traced: Path, place: Path, name: str, row: int) -> Path:
    """The trace with one number of step 1 changed."""
    shutil.copytree(traced / "routing", place)
    file = place / "step-00000001" / "rank-00000.safetensors"
    tensors = load_file(file)
    tensors[name][row] += 1 if name == "tokens" else 10**9
    save_file(tensors, file, metadata={"ranks": "1"})
    return place


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tokens", r"has id \d+ as token \d+ of the text, and this run \d+"),
        ("index", r"does not have token \d+ of the"),
    ],
)
def test_one_other_token_is_refused_on_every_rank(data, traced, tmp_path, name, words):
    place = edited(traced, tmp_path / "edited", name, -1)  # a token of the last row: the second rank's
    said = run_ranks(complaint, 2, str(tmp_path), tiny(data, *WORDS, "parallel.ep=2", f"moe.replay={place}"))
    assert said[0] == said[1]
    with pytest.raises(DataError, match=rf"moe\.replay \(.*edited\) {words}.*same data, seed"):
        raise DataError(said[0])


def test_another_text_is_refused(data, traced, tmp_path):
    other = tmp_path / "corpus.jsonl"
    other.write_text(data.read_text(encoding="utf-8").replace("Python", "Monty"), encoding="utf-8")
    words = tiny(data, *WORDS, f"data.path={other}", f"data.cache={tmp_path}", f"moe.replay={traced}")
    assert "replay with the same data, seed, train.seq_len" in complaint(str(tmp_path / "run"), words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["moe=mixtral"], "has layers [1] and this run [0, 1]"),
        (["moe.num_experts=4"], "has experts 8 and this run 4"),
        (["moe.router=switch"], "has top_k 2 and this run 1"),
        (["moe.router=softmax"], "has router gshard and this run softmax"),
        (["seed=1"], "does not have token"),
        (["train.steps=4"], "has no step 3: trace that many steps"),
    ],
)
def test_another_model_or_run_is_refused_by_what_differs(data, traced, tmp_path, words, message):
    assert message in complaint(str(tmp_path), tiny(data, *WORDS, *words, f"moe.replay={traced}"))


def test_the_documented_example_tells_where_tokens_of_one_kind_go(traced, capsys):
    page = (Path(__file__).parents[3] / "docs" / "training.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(example.replace("runs/traced", str(traced)).replace("step=99", "step=2"), {})  # noqa: S102
    layer, counts = capsys.readouterr().out.split(" ", 1)
    assert layer == "1"
    assert 0 < sum(json.loads(counts)) < 128


def test_a_place_without_a_whole_trace_is_refused(data, traced, tmp_path):
    assert "holds no trace: name a run that was trained with moe.trace=true" in complaint(
        str(tmp_path / "run"), tiny(data, f"moe.replay={tmp_path}")
    )
    place = shutil.copytree(traced / "routing", tmp_path / "copy") / "step-00000000" / "rank-00000.safetensors"
    save_file(load_file(place), place, metadata={"ranks": "2"})
    with pytest.raises(DataError, match=r"step-00000000 holds 1 of 2 ranks' files"):
        read_trace(tmp_path / "copy", 0)
    place.write_bytes(place.read_bytes()[:-8])
    with pytest.raises(DataError, match=r"rank-00000\.safetensors does not read as a trace"):
        read_trace(tmp_path / "copy", 0)


def test_a_resumed_run_forgets_the_steps_that_it_takes_again(data, tmp_path):
    run, words = tmp_path / "run", ["moe=gshard", "moe.trace=true", "train.save_every=2", "train.keep=9"]
    go(str(run), tiny(data, *words, "train.steps=4"))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    lost = read_trace(run, 3)
    go(str(run), tiny(data, *words, "train.steps=3", "train.resume=true"))
    assert sorted(p.name for p in (run / "routing").glob("step-*")) == [f"step-{s:08d}" for s in range(3)]
    go(str(run), tiny(data, *words, "train.steps=4", "train.resume=true"))
    assert torch.equal(read_trace(run, 3)["index"], lost["index"])


def test_expert_ids_take_as_few_bytes_as_they_need(data, tmp_path):
    go(str(tmp_path / "run"), tiny(data, "moe.num_experts=300", "moe.trace=true", "train.steps=1"))
    file = tmp_path / "run" / "routing" / "step-00000000" / "rank-00000.safetensors"
    assert load_file(file)["layers.1.ids"].dtype == torch.int16
    assert read_trace(tmp_path / "run", 0)["layers"][1]["ids"].max() > 255
