"""Ways of making a model smaller follow each other: pruned, taught by what it was, rounded, served."""

import math

import torch

from turnout import LLM, SamplingParams
from turnout.launch.compress import CompressOptions, compress
from turnout.launch.evaluate import EvaluateOptions, report
from turnout.moe import load_model
from turnout.tests.helpers.runs import tiny
from turnout.tests.launch.test_slimmed import go, sentences
from turnout.tests.moe.families.parity import packed_logits


def test_a_model_is_pruned_taught_rounded_and_served(tmp_path):
    corpus = tmp_path / "corpus.jsonl"
    sentences(corpus)
    words = tiny(
        corpus, "data.vocab_size=270", "model.width=64", "moe=switch", "moe.every=1", "moe.expert_width=128",
        "model.ffn_width=128", "optim=adamw", "optim.lr=0.01", "log.every=10", "train.save_every=100",
    )  # fmt: skip
    go(tmp_path / "whole", [*words, "moe.num_experts=4", "train.steps=30"])
    common = {"data": str(corpus), "calibration": str(corpus), "seq_len": 32, "samples": 8, "speed": False}
    compress(tmp_path / "whole", tmp_path / "fewer", CompressOptions(method="experts", num_experts=2, **common))
    zeros = {"method": "sparsegpt", "sparsity": 0.3, "min_rows": 4}
    compress(tmp_path / "fewer", tmp_path / "pruned", CompressOptions(**zeros, **common))
    teacher = [f"train.distill.teacher={tmp_path / 'whole'}", f"train.init={tmp_path / 'pruned'}"]
    go(tmp_path / "taught", [*words, *teacher, "train.distill.soft=0.5", "train.steps=10"])
    found = compress(tmp_path / "taught", tmp_path / "rounded", CompressOptions(method="gptq", min_rows=4, **common))

    assert found["bytes_after"] < 0.3 * found["bytes_before"]
    cfg = load_model(tmp_path / "rounded").cfg
    assert (cfg.moe.num_experts, cfg.quantization.bits) == (2, 4)
    losses = {
        name: report(tmp_path / name, EvaluateOptions(data=str(corpus)))["loss"]
        for name in ("whole", "pruned", "taught", "rounded")
    }
    assert losses["taught"] < losses["pruned"], losses
    assert losses["rounded"] < 0.5 * math.log(270), losses
    (served,) = LLM(str(tmp_path / "rounded"), kv_memory_mb=8).generate(
        ["import returns the"], SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    )
    ids = [*served.prompt_token_ids, *served.outputs[0].token_ids]
    model = load_model(tmp_path / "rounded")
    with torch.no_grad():
        again = packed_logits(model, [torch.tensor(ids)]).argmax(-1).tolist()
    assert again[len(served.prompt_token_ids) - 1 : -1] == list(served.outputs[0].token_ids)
