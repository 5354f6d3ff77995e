"""An encoder-decoder through the whole of a run: it learns, resumes to the same bits, is saved, loaded, evaluated."""

import pytest
import torch

from turnout import ConfigError
from turnout.launch.compose import compose
from turnout.launch.evaluate import EvaluateOptions, describe, report
from turnout.launch.main import main
from turnout.launch.rundir import freeze
from turnout.moe.config import AttentionConfig, EncoderConfig, ModelConfig, MoEConfig
from turnout.moe.flops import flops_per_token
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.init import init_weights
from turnout.moe.models.store import load_model
from turnout.moe.shapes import is_hidden_matrix, shapes
from turnout.moe.train.loop import Outcome, train
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

ENCODER = [
    "model.encoder={layers: 2, start_token_id: 0}", "model.attention={positions: relative}", "model.activation=relu",
    "data.spans={sentinels: 8, density: 0.15}", "moe.activation=relu", "moe.num_experts=4", "train.dtype=float32",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def go(run, words, stop_after=None) -> Outcome:
    """Train as this rank; the last rank asks to stop after `stop_after` steps."""
    config = compose(words, world=process.world()).config
    run.mkdir(exist_ok=True)
    asked, last = iter(range(10**9)), process.rank() == process.world() - 1
    return train(config, run, build_mesh(config.parallel, "cpu", 4), lambda: last and next(asked) == stop_after)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    words = tiny(data, *ENCODER, "train.steps=40", "train.global_batch=8", "optim=adamw", "train.seq_len=64")
    config = compose([*words, f"run={run}"])
    freeze(run, config.config, words)
    go(run, words)
    return run


def test_the_loss_falls_and_rows_tell_of_the_layers_of_both_stacks(trained):
    seen = rows(trained, "train")
    assert seen[-1]["loss"] < seen[0]["loss"] - 1
    assert seen[0]["moe_layers"] == [1, 3]
    assert all(len(row["expert_load"]) == 2 for row in seen)
    assert seen[0]["tokens"] == 8 * (10 + 3 + 1), "noise, marks and the end of each row"
    assert "bits_per_byte" not in rows(trained, "eval")[-1]


def test_the_servable_form_is_evaluated_as_in_the_run(trained, data):
    found = report(trained, EvaluateOptions(data=str(data), seq_len=64))
    assert found["loss"] == pytest.approx(rows(trained, "eval")[-1]["val_loss"], rel=1e-5)
    assert "bits_per_byte" not in found
    assert [layer["layer"] for layer in found["experts"]] == [1, 3]
    assert "shuffled_loss" in found
    assert any("nats a token" in line for line in describe(found))
    with pytest.raises(ConfigError, match="baselines"):
        report(trained, EvaluateOptions(data=str(data), baselines=True))
    assert load_model(trained).cfg.encoder == EncoderConfig(layers=2)


def test_two_ranks_resume_to_the_same_bits(data, tmp_path):
    words = tiny(data, *ENCODER, "parallel.ep=2", "train.save_every=null", "train.micro_batch=1")
    assert run_ranks(go, 2, tmp_path / "whole", words)[0] == Outcome(step=6, preempted=False)
    assert run_ranks(go, 2, tmp_path / "parts", words, 3)[0] == Outcome(step=3, preempted=True)
    assert run_ranks(go, 2, tmp_path / "parts", [*words, "train.resume=true"])[0] == Outcome(step=6, preempted=False)
    assert fingerprint(tmp_path / "whole", 6) == fingerprint(tmp_path / "parts", 6)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["data.spans=null"], "model.encoder"),
        (["model.encoder=null"], "data.spans"),
        (["parallel.pp=2"], "parallel.pp"),
        (["parallel.tp=2"], "parallel.tp"),
        (["parallel.cp=2"], "parallel.cp"),
        (["engine=deepspeed", "optim=adamw"], "engine"),
        (["train.compile=true"], "train.compile"),
        (["moe.trace=true"], "moe.trace"),
        (["data.spans={sentinels: 1}"], "data.spans.sentinels"),
        (["data.spans={sentinels: 200}"], "data.vocab_size"),
        (["data.spans={sentinels: 8, density: 1.5}"], "data.spans.density"),
        (["model.encoder={layers: 2, start_token_id: 400}"], "model.encoder.start_token_id"),
    ],
)
def test_what_can_not_work_is_refused_with_its_name(data, words, named):
    with pytest.raises(ConfigError, match=named.replace(".", r"\.")):
        compose(tiny(data, *ENCODER, "nproc=2", *words))


def model_of(**changed) -> ModelConfig:
    fields = {
        "vocab_size": 40, "width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 6, "ffn_width": 24,
        "max_seq_len": 32, "activation": "relu", "attention": AttentionConfig(positions="relative"),
        "encoder": EncoderConfig(layers=3),
        "moe": MoEConfig(width=16, expert_width=8, activation="relu", num_experts=4),
    }  # fmt: skip
    return ModelConfig(**fields | changed)


def test_the_parameters_are_those_that_are_said():
    cfg = model_of()
    with torch.device("meta"):
        built = {name: tuple(weight.shape) for name, weight in Decoder(cfg).named_parameters()}
    assert built == shapes(cfg)
    assert not is_hidden_matrix("encoder.relative.weight", 2)
    assert is_hidden_matrix("encoder.blocks.0.ffn.experts.w_in", 3)


def test_flops_are_counted_by_weights_and_by_pairs_of_tokens():
    cfg, target, source = model_of(), 10, 20
    per = {name: torch.Size(shape).numel() for name, shape in shapes(cfg).items() if len(shape) > 1}
    per = {name: n // 4 if ".experts." in name else n for name, n in per.items() if "relative" not in name}
    reads = ("encoder.", "blocks.0.cross.wk", "blocks.0.cross.wv", "blocks.1.cross.wk", "blocks.1.cross.wv")
    encoded = sum(n for name, n in per.items() if name.startswith(reads))
    weights = source * encoded + target * (sum(per.values()) - encoded)
    pairs = 2 * target * target + 3 * 2 * source * source + 2 * 2 * target * source  # causal ones are half
    assert flops_per_token(cfg, target, source) == pytest.approx(6 * (weights + 12 * pairs) / target)


def test_a_tied_head_with_a_scale_starts_with_the_logits_of_one_without():
    scaled, plain = (Decoder(model_of(logit_scale=scale)) for scale in (0.25, 1.0))
    for model in (scaled, plain):
        init_weights(model, seed=3)
    torch.testing.assert_close(scaled.embed.weight * 0.25, plain.embed.weight)


def test_the_experiment_is_the_one_that_is_described():
    config = compose(["experiment=t5_pydocs"]).config
    assert config.model.moe_layers == (1, 3)
    assert config.row == (38 + 13 + 1, 256 - 38 + 13 + 1)
    assert config.data.spans.sentinels == 100


def test_a_plan_is_refused_before_it_would_be_wrong(capsys):
    assert main(["plan", "experiment=t5_pydocs", "nproc=1"]) == 2
    assert "model.encoder (set)" in capsys.readouterr().err
