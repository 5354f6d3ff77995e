"""A slimmed model is a model like any other: it loads, serves, converts, and recovers by training."""

import json
import math
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import MixtralConfig, MixtralForCausalLM

from turnout import LLM, SamplingParams
from turnout.launch.compose import compose
from turnout.launch.main import main
from turnout.moe import Decoder, ModelConfig, load_model, save_model
from turnout.moe.compress.channels import narrow_block, narrower
from turnout.moe.compress.experts import fewer_experts, prune_experts
from turnout.moe.compress.layers import shallower
from turnout.moe.compress.merging import merge_experts
from turnout.moe.compress.routed import Routed, noting
from turnout.moe.data.tokenizer import Tokenizer
from turnout.moe.eval.perplexity import evaluate
from turnout.moe.layers.moe import MoE
from turnout.moe.train.loop import Trainer
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers import foreign
from turnout.tests.helpers.runs import tiny
from turnout.tests.moe.families.parity import assert_logits, packed_logits, tokens

WAYS = {
    "experts": lambda cfg: fewer_experts(cfg, 3),
    "merge": lambda cfg: fewer_experts(cfg, 2),
    "channels": lambda cfg: narrower(cfg, 0.5),
    "layers": lambda cfg: shallower(cfg, (1,)),
}


def slim(model: Decoder, way: str, cfg: ModelConfig) -> dict[str, torch.Tensor]:
    """The tensors of the smaller model; the blocks of `model` are changed on the way."""
    if way == "layers":
        model.blocks = torch.nn.ModuleList([model.blocks[1]])
        return model.state_dict()
    for block in model.blocks:
        if way == "channels":
            narrow_block(block, cfg, {})
        elif isinstance(block.ffn, MoE):
            with noting(block.ffn) as parts:
                packed_logits(model, tokens(model.cfg.vocab_size, (30, 20)))
            change = prune_experts if way == "experts" else merge_experts
            change(block, cfg.moe.num_experts, Routed.joined(parts))
    model.cfg = cfg
    return model.state_dict()


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("theirs") / "mixtral"
    foreign.make(folder, MixtralForCausalLM, MixtralConfig, num_local_experts=4)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS)
def test_it_loads_serves_and_becomes_a_stranger_s_model_again(mixtral, way, tmp_path):
    model = load_model(mixtral)
    cfg = WAYS[way](model.cfg)
    tensors = slim(model, way, cfg)
    path = save_model(tmp_path / "slim", cfg, tensors, mixtral)
    loaded = load_model(path)
    assert loaded.cfg == cfg
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in tensors.items())
    sizes = [sum(t.numel() for t in one.values()) for one in (tensors, load_model(mixtral).state_dict())]
    assert sizes[0] < 0.9 * sizes[1]

    ids = tokens(cfg.vocab_size, (12,))[0].tolist()
    (output,) = LLM(path, kv_memory_mb=8).generate([ids], SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    for token in output.outputs[0].token_ids:
        assert token == int(packed_logits(loaded, [torch.tensor(ids)])[-1].argmax())
        ids.append(token)

    assert main(["convert", str(path), str(tmp_path / "back")]) == 0
    theirs = MixtralForCausalLM.from_pretrained(tmp_path / "back")
    assert json.loads((tmp_path / "back" / "config.json").read_text())["num_local_experts"] == cfg.moe.num_experts
    text = tokens(cfg.vocab_size, (21,))
    assert_logits(packed_logits(loaded, text), theirs(text[0][None]).logits[0], 1e-4)


def go(run: Path, words: list[str]) -> None:
    config = compose(words, world=1).config
    run.mkdir()
    Trainer(config, run, build_mesh(config.parallel, "cpu", config.model.moe.num_experts), lambda: False).run()


def sentences(file: Path) -> list[str]:
    """A text that a small model learns in seconds, in `file`; the held-out documents."""
    words, draw = ["import", "returns", "the", "list", "of", "all", "open", "files"], random.Random(0)
    texts = [" ".join((words[i:] + words[:i]) * 4) for i in (draw.randrange(len(words)) for _ in range(120))]
    rows = [{"text": text, "split": "train" if i >= 4 else "validation"} for i, text in enumerate(texts)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return texts[:4]


def test_training_starts_from_it_and_it_recovers(tmp_path):
    held_out = sentences(tmp_path / "corpus.jsonl")
    words = tiny(
        tmp_path / "corpus.jsonl", "data.vocab_size=270", "moe=switch", "moe.every=1", "moe.expert_width=64",
        "model.ffn_width=64", "optim=adamw", "optim.lr=0.01", "log.every=10", "train.save_every=100",
    )  # fmt: skip
    go(tmp_path / "whole", [*words, "moe.num_experts=4", "train.steps=30"])
    model = load_model(tmp_path / "whole")
    cfg = narrower(fewer_experts(model.cfg, 2), 0.25)
    for block in model.blocks:
        with noting(block.ffn) as parts:
            packed_logits(model, tokens(model.cfg.vocab_size, (30, 20)))
        prune_experts(block, 2, Routed.joined(parts))
        narrow_block(block, cfg, {})
    slim = save_model(tmp_path / "slim", cfg, model.state_dict(), tmp_path / "whole" / "model")
    go(tmp_path / "again", [*words, "train.steps=15", f"train.init={slim}"])

    tokenizer, losses = Tokenizer.load(slim), {}
    for run in ("whole", "slim", "again"):
        losses[run] = evaluate(load_model(tmp_path / run), tokenizer, held_out, seq_len=32).val_loss
    assert load_model(tmp_path / "again").cfg.moe == replace(cfg.moe, capacity_tokens=32)
    assert losses["whole"] < losses["slim"] < 0.9 * math.log(270)  # damaged, and still nobody who knows nothing
    assert losses["again"] < losses["slim"] - 0.1, losses
