"""The loop's promises, on one process and on real gloo ranks: replay, resume, layouts, the stop vote, non-finite."""

import json
import math
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turnout import CheckpointError, ConfigError, NonFiniteError
from turnout.launch.compose import compose
from turnout.moe.data.corpus import read_documents
from turnout.moe.data.rows import Cursor
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.store import load_model
from turnout.moe.train import loop, setup
from turnout.moe.train.config import RunConfig
from turnout.moe.train.loop import Trainer, train
from turnout.moe.train.setup import build_model, prepare_run, resume
from turnout.moe.train.trace import read_trace
from turnout.parallel import process
from turnout.parallel.checkpoint import latest
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

BIAS = "blocks.1.ffn.router.balance_bias"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def mesh_of(config: RunConfig):
    return build_mesh(config.parallel, "cpu", config.model.moe.num_experts if config.model.moe else None)


def go(run: str, words: list[str], stop_after: int | None = None) -> loop.Outcome:
    """Train as this rank of however many there are; the last rank asks to stop after `stop_after` steps."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    asked = iter(range(10**9))
    last = process.rank() == process.world() - 1
    return train(config, Path(run), mesh_of(config), lambda: last and next(asked) == stop_after)


def two_ranks(run: Path, words: list[str], stop_after: int | None = None) -> loop.Outcome:
    return run_ranks(go, 2, str(run), [*words, "parallel.ep=2"], stop_after)[0]


def test_a_run_twice_is_the_same_bits(data, tmp_path):
    words = tiny(data, "moe=gshard", "train.micro_batch=2", "moe.jitter=0.01")
    for name in ("a", "b"):
        assert go(str(tmp_path / name), words) == loop.Outcome(step=6, preempted=False)
    assert fingerprint(tmp_path / "a", 6) == fingerprint(tmp_path / "b", 6)
    other = tmp_path / "c"
    go(str(other), [*words, "seed=1"])
    assert fingerprint(tmp_path / "a", 6) != fingerprint(other, 6)


@pytest.mark.parametrize(
    "moe",
    [
        pytest.param("switch", marks=pytest.mark.full),
        "gshard",
        "deepseek_v3",
        "switch optim=adafactor",
        pytest.param("switch optim.state_dtype=bfloat16", marks=pytest.mark.full),
        "gshard parallel.chunks=2",
        pytest.param("gshard parallel.exchange_rows=20", marks=pytest.mark.full),
    ],
)
def test_a_run_stopped_at_two_ranks_resumes_to_the_same_bits(data, tmp_path, moe):
    words = tiny(data, *f"moe={moe}".split(), "train.save_every=null")
    assert two_ranks(tmp_path / "whole", words) == loop.Outcome(step=6, preempted=False)
    assert two_ranks(tmp_path / "parts", words, stop_after=3) == loop.Outcome(step=3, preempted=True)
    assert not (tmp_path / "parts" / "model").exists()
    assert two_ranks(tmp_path / "parts", [*words, "train.resume=true"]) == loop.Outcome(step=6, preempted=False)
    assert fingerprint(tmp_path / "whole", 6) == fingerprint(tmp_path / "parts", 6)
    for kind in ("train", "eval"):
        once, twice = rows(tmp_path / "whole", kind), rows(tmp_path / "parts", kind)
        assert [untimed(row) for row in once] == [untimed(row) for row in twice]


def untimed(row):
    times = ("seconds", "tokens_per_second", "all_to_all_seconds", "all_to_all_under_way", "all_to_all_share")
    return {key: value for key, value in row.items() if key not in times}


@pytest.fixture(scope="module")
def stopped(data, tmp_path_factory):
    """The words of a run, and where it lies `whole` and stopped after three steps."""
    words, runs = tiny(data, "moe=deepseek_v3", "train.save_every=null", "optim=adamw"), tmp_path_factory.mktemp("runs")
    go(str(runs / "whole"), words)
    go(str(runs / "parts"), words, stop_after=3)
    return words, runs


@pytest.mark.parametrize("forgotten", ["cursor", "optimizer", "bias", "nothing"])
def test_leaving_any_part_of_the_state_out_of_a_checkpoint_would_be_seen(stopped, tmp_path, monkeypatch, forgotten):
    words, runs = stopped
    shutil.copytree(runs / "parts", tmp_path / "parts")

    def forgetful(config, run, setup):
        now, path = resume(config, run, setup)
        if forgotten == "optimizer":
            for kept in setup.engine.optimizers[0].state.values():
                kept["exp_avg"].zero_()
        if forgotten == "bias":
            setup.model.get_buffer(BIAS).zero_()
        return replace(now, cursor=Cursor()) if forgotten == "cursor" else now, path

    monkeypatch.setattr(loop, "resume", forgetful)
    go(str(tmp_path / "parts"), [*words, "train.resume=true"])
    same = fingerprint(runs / "whole", 6) == fingerprint(tmp_path / "parts", 6)
    assert same == (forgotten == "nothing")


def test_the_random_streams_are_the_step_and_the_seed(data, tmp_path):
    config = compose(tiny(data, "moe=gshard", "moe.capacity_factor=null")).config
    trainer = Trainer(config, tmp_path, mesh_of(config), lambda: False)
    losses = []
    for step in (0, 1, 0):
        trainer.now = replace(trainer.now, step=step)
        losses.append(float(trainer._loss(0, trainer.setup.engine.forward(*trainer._inputs(0))).detach()))
    assert losses[0] == losses[2] != losses[1]
    trainer.metrics.close()


@pytest.mark.parametrize("ranks", [1, 2], ids=["alone", "pipeline"])
def test_a_step_holds_the_routing_of_no_more_micro_batches_than_are_under_way(data, tmp_path, ranks):
    words = tiny(data, "train.micro_batch=1", "train.global_batch=8", "train.steps=1", f"parallel.pp={ranks}")
    run = str(tmp_path / "run")
    for most in run_ranks(most_held, ranks, run, words, timeout=400) if ranks > 1 else [most_held(run, words)]:
        assert most <= ranks


def most_held(run: str, words: list[str]) -> int:
    """How many micro-batches' routings were alive at once, at most, when a forward pass was done."""
    config, alive, most = compose(words, world=process.world()).config, [], []
    Path(run).mkdir(exist_ok=True)
    trainer = Trainer(config, Path(run), mesh_of(config), lambda: False)
    record = trainer._record

    def watched(micro: int) -> None:
        alive.append(weakref.ref(trainer.parts[micro].ctx))
        record(micro)
        most.append(sum(context() is not None and bool(context().routings) for context in alive))

    trainer._record = watched
    trainer.run()
    assert len(alive) == 8
    return max(most)


def logits(words: list[str], run: str) -> torch.Tensor:
    """Logits on fixed tokens of the model in the run's newest checkpoint, at this number of ranks, in evaluation."""
    config = compose([*words, "train.resume=true"], world=process.world()).config
    mesh = mesh_of(config)
    setup = prepare_run(config, Path(run), mesh)
    resume(config, Path(run), setup)
    tokens_T = torch.arange(64) * 5 % 400
    ctx = VarlenContext(torch.tensor([0, 20, 64], dtype=torch.int32))
    with torch.no_grad():
        return setup.model.eval()(tokens_T, torch.cat([torch.arange(20), torch.arange(44)]), ctx)


def test_a_checkpoint_of_two_ranks_gives_equal_logits_on_one_and_in_the_exported_model(data, tmp_path):
    words = tiny(data, "train.dtype=float32")
    two_ranks(tmp_path / "run", words)
    both = run_ranks(logits, 2, [*words, "parallel.ep=2"], str(tmp_path / "run"))
    alone = logits(words, str(tmp_path / "run"))
    torch.testing.assert_close(both[0], alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both[1], alone, rtol=1e-5, atol=1e-5)
    model, checkpoint = load_model(tmp_path / "run"), latest(tmp_path / "run" / "checkpoints")
    for name, weight in model.named_parameters():
        assert torch.equal(weight, checkpoint.read_all(f"model/{name}").view(weight.shape)), name
    tokens_T, positions_T = torch.arange(64) * 5 % 400, torch.cat([torch.arange(20), torch.arange(44)])
    with torch.no_grad():
        exported = model(tokens_T, positions_T, VarlenContext(torch.tensor([0, 20, 64], dtype=torch.int32)))
    torch.testing.assert_close(exported, alone, rtol=1e-5, atol=1e-5)
    assert alone.std() > 0.01, "the logits must say something"


@pytest.mark.parametrize("moe", ["switch", "qwen3_moe", "switch optim=adafactor", "switch optim.state_dtype=bfloat16"])
def test_two_ranks_follow_one_rank_s_losses(data, tmp_path, moe):
    words = tiny(data, "optim=adamw", *f"moe={moe}".split(), "train.dtype=float32")
    go(str(tmp_path / "one"), words)
    two_ranks(tmp_path / "two", words)
    for name in ("loss", "aux_loss", "aux/balance"):
        one, two = ([row[name] for row in rows(tmp_path / run)] for run in ("one", "two"))
        assert one == pytest.approx(two, rel=1e-4), name
    losses = [row["loss"] for row in rows(tmp_path / "one")]
    assert losses[-1] < losses[0]


def poisoned(run: str, words: list[str], name: str) -> tuple[str, bool]:
    """Train with a NaN in one weight of the last rank alone; the error, and whether a parameter moved here."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    trainer = Trainer(config, Path(run), mesh_of(config), lambda: False)
    if process.rank() == process.world() - 1:
        with torch.no_grad():
            trainer.setup.model.get_parameter(name).view(-1)[0] = math.nan
    before = [weight.detach().clone() for weight in trainer.setup.model.parameters()]
    try:
        trainer.run()
    except NonFiniteError as error:
        now = list(trainer.setup.model.parameters())
        return str(error), all(torch.equal(a, b) or a.isnan().any() for a, b in zip(before, now, strict=True))
    return "", False


@pytest.mark.parametrize("name", ["blocks.1.ffn.experts.w_out", "blocks.1.ffn.router.weight"])
def test_a_nan_on_one_rank_stops_all_and_moves_no_parameter(data, tmp_path, name):
    results = run_ranks(poisoned, 2, str(tmp_path / "run"), tiny(data, "parallel.ep=2"), name)
    for message, unmoved in results:
        assert "of step 0 is not finite" in message
        assert f"not finite before it: {name})" in message
        assert "no parameter moved" in message
        assert unmoved
    note = json.loads((tmp_path / "run" / "nonfinite.json").read_text())
    assert (note["step"], note["cursor"], len(note["losses"])) == (0, {"epoch": 0, "row": 0}, 2)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def disagreeing(run: str, words: list[str], what: str) -> str:
    """Train with something else on the last rank; each rank reads the corpus of a directory of its own."""
    here = os.getcwd()
    os.chdir(f"{run}/{process.rank()}" if what in ("training data", "tokenizer") else run)
    digest, setup.source_digest = setup.source_digest, lambda: f"{what} {process.rank() if what == 'code' else 0}"
    try:
        go("run", [*words, f"seed={process.rank() if what == 'seed' else 0}"])
    except ConfigError as error:
        return str(error)
    finally:
        os.chdir(here)
        setup.source_digest = digest
    return ""


@pytest.mark.parametrize("what", ["seed", "code", "training data", "tokenizer"])
def test_ranks_that_disagree_are_refused_by_name(data, tmp_path, what):
    text, words = data.read_text(), tiny(data)
    changed = {"training data": ("python", "jython"), "tokenizer": ("a ", "q ")}.get(what)
    if changed is not None:
        words += ["data.path=corpus.jsonl", "data.cache=null"]
        for rank in (0, 1):
            (tmp_path / str(rank)).mkdir()
            (tmp_path / str(rank) / "corpus.jsonl").write_text(text.replace(*changed) if rank else text)
    if what == "training data":
        train_tokenizer(read_documents(str(data), "train"), 400).save(tmp_path / "tokenizer")
        words.append(f"data.tokenizer={tmp_path / 'tokenizer'}")
    messages = run_ranks(disagreeing, 2, str(tmp_path), words, what)
    assert messages[0] == messages[1]
    assert messages[0].startswith(f"{what} (")
    assert "on rank 1) must be the same on every rank" in messages[0]


def test_a_run_by_time_ends_by_time_at_the_same_step_on_both_ranks(data, tmp_path):
    words = tiny(data, "train.steps=null", "train.seconds=1.5", "parallel.ep=2", "train.save_every=null")
    outcomes = run_ranks(go, 2, str(tmp_path / "run"), words)
    assert outcomes[0] == outcomes[1]
    assert outcomes[0].step >= 1
    assert not outcomes[0].preempted


def test_the_loss_free_bias_moves_by_the_load_of_the_global_batch_and_is_exported_in_float32(data, tmp_path):
    words = tiny(data, "moe=deepseek_v3", "train.dtype=float32", "moe.trace=true", "train.steps=1")
    go(str(tmp_path / "one"), [*words, "train.micro_batch=1"])
    two_ranks(tmp_path / "two", words)
    decided = read_trace(tmp_path / "one", 0)["layers"][1]
    counts_E = decided["ids"][decided["wanted"]].bincount(minlength=16)
    expected_E = 1e-3 * torch.sign(counts_E.float().mean() - counts_E)
    expected_E -= expected_E.mean()
    assert expected_E.std() > 0
    for run in (tmp_path / "one", tmp_path / "two"):
        exported = load_model(run, "bfloat16").state_dict()[BIAS]
        assert exported.dtype == torch.float32
        assert torch.equal(exported, latest(run / "checkpoints").read_all(f"model/{BIAS}"))
        torch.testing.assert_close(exported, expected_E, rtol=0, atol=1e-8)


def test_the_bias_is_part_of_the_weights_that_a_run_starts_from(data, tmp_path):
    go(str(tmp_path / "run"), tiny(data, "moe=deepseek_v3", "train.steps=2"))
    config = compose(tiny(data, "moe=deepseek_v3", f"train.init={tmp_path / 'run'}")).config
    model, _ = build_model(config.model, config, mesh_of(config))
    assert model.state_dict()[BIAS].abs().sum() > 0
    assert torch.equal(model.state_dict()[BIAS], load_model(tmp_path / "run").state_dict()[BIAS])


def test_a_step_that_is_not_finite_moves_no_bias(data, tmp_path):
    config = compose(tiny(data, "moe=deepseek_v3")).config
    trainer = Trainer(config, tmp_path, mesh_of(config), lambda: False)
    with torch.no_grad():
        trainer.setup.model.norm.weight[0] = math.nan
    with pytest.raises(NonFiniteError):
        trainer.run()
    assert not trainer.setup.model.state_dict()[BIAS].any()


def test_a_collapse_is_told_once_and_only_when_it_is_asked_for(data, tmp_path):
    for name, word, alarms in (("asked", "log.alarm=0.999", [3]), ("off", "log.alarm=null", [])):
        go(str(tmp_path / name), tiny(data, word))
        assert [row["step"] for row in rows(tmp_path / name, "alarm")] == alarms


def test_a_dense_model_trains_without_any_router(data, tmp_path):
    assert go(str(tmp_path / "run"), tiny(data, "model.moe=null", "train.steps=2")).step == 2
    assert [row["expert_load"] for row in rows(tmp_path / "run")] == [[], []]


def deepspeed_three_times(root: str, words: list[str]) -> None:
    """A whole run, one stopped after three steps, and its second part."""
    words = [*words, "engine=deepspeed", "parallel.ep=2"]
    go(f"{root}/whole", words)
    go(f"{root}/parts", words, stop_after=3)
    go(f"{root}/parts", [*words, "train.resume=true"])


@pytest.mark.parametrize("moe", ["switch", pytest.param("deepseek_v3", marks=pytest.mark.full)])
def test_deepspeed_trains_saves_and_resumes_like_the_native_engine(data, tmp_path, moe):
    words = tiny(data, f"moe={moe}", "optim=adamw", "train.dtype=float32")
    two_ranks(tmp_path / "native", words)
    run_ranks(deepspeed_three_times, 2, str(tmp_path), words, fresh=True, env={"DS_ACCELERATOR": "cpu"})
    native, whole = ([row["loss"] for row in rows(tmp_path / name)] for name in ("native", "whole"))
    assert native == pytest.approx(whole, rel=1e-4)
    assert fingerprint(tmp_path / "whole", 6) == fingerprint(tmp_path / "parts", 6)


def test_another_model_or_seed_does_not_resume(data, tmp_path):
    words = tiny(data, "train.steps=2")
    go(str(tmp_path / "run"), words)
    for change, name in (("model.ffn_width=32", "model.ffn_width"), ("seed=5", "seed"), ("moe=gshard", "model.moe")):
        with pytest.raises(ConfigError, match=rf"{name}.* when the checkpoint was written"):
            go(str(tmp_path / "run"), [*words, change, "train.resume=true"])
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        go(str(tmp_path / "other"), [*words, f"train.resume={tmp_path}"])


def test_an_older_checkpoint_of_the_same_run_is_not_gone_on_from(data, tmp_path):
    words = tiny(data, "train.keep=9")
    go(str(tmp_path / "run"), words)
    older = f"train.resume={tmp_path}/run/checkpoints/step-00000002"
    with pytest.raises(ConfigError, match=r"is step 2 and .*/run has saved step 6: use train\.resume=true"):
        go(str(tmp_path / "run"), [*words, older])
    assert go(str(tmp_path / "other"), [*words, older]).step == 6


def test_a_finished_run_resumes_further_when_given_more_steps(data, tmp_path):
    go(str(tmp_path / "run"), tiny(data, "train.steps=2"))
    assert go(str(tmp_path / "run"), tiny(data, "train.steps=4", "train.resume=true")).step == 4
    assert [row["step"] for row in rows(tmp_path / "run")] == [1, 2, 3, 4]


def test_init_starts_from_another_run_s_weights_at_step_0(data, tmp_path):
    go(str(tmp_path / "run"), tiny(data))
    trained = dict(load_model(tmp_path / "run").named_parameters())
    config = compose(tiny(data, f"train.init={tmp_path / 'run'}")).config
    model, _ = build_model(config.model, config, mesh_of(config))
    assert all(torch.equal(weight, trained[name]) for name, weight in model.named_parameters())
    bad = compose(tiny(data, "model.ffn_width=32")).config
    bad = replace(bad, train=replace(bad.train, init=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match=r"train\.init .* of shape"):
        build_model(bad.model, bad, mesh_of(bad))


def test_an_evaluation_during_the_run_changes_nothing(data, tmp_path):
    words = tiny(data, "optim=adamw")
    go(str(tmp_path / "plain"), words)
    go(str(tmp_path / "often"), [*words, "train.eval_every=1", "train.eval_bytes=1000"])
    assert fingerprint(tmp_path / "plain", 6) == fingerprint(tmp_path / "often", 6)
    assert [row["step"] for row in rows(tmp_path / "often", "eval")] == [1, 2, 3, 4, 5, 6, 6]
