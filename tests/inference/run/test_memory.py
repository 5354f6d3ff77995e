"""What a server holds at most is planned before it is allocated, and the plan holds."""
# ruff: noqa: N802 (M9 is the name of a rule)

import json
import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from turnout import ConfigError
from turnout.configs.typed import build
from turnout.inference.config import EngineConfig
from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.step import Scheduled
from turnout.inference.engine import Engine
from turnout.inference.ranks import Ranks
from turnout.inference.run.activations import SAMPLING, Activations
from turnout.inference.run.experts import ExpertPages
from turnout.inference.run.free import free_memory, group_memory
from turnout.inference.run.kv import MIB
from turnout.inference.run.memory import SHARE, WORKSPACE, plan_memory
from turnout.inference.run.sampler import sample
from turnout.moe import Decoder, ModelConfig, save_model
from turnout.moe.quantization_config import QuantizationConfig
from turnout.parallel import ParallelConfig, build_mesh
from turnout.tests.helpers.memory import Memory
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.worst_step import drain, resident, start_peak

LATENT = {"latent": {"rank": 64, "rope_dim": 16, "value_dim": 32}}
SPARSE = {"width": 512, "expert_width": 512, "num_experts": 128, "top_k": 16, "router": "topk_softmax"}
PLAIN = {
    "vocab_size": 512, "width": 128, "layers": 1, "heads": 8, "kv_heads": 2, "head_dim": 32, "ffn_width": 256,
    "max_seq_len": 1024,
}  # fmt: skip
WORST = {  # what the step is full of: model, engine, dtype
    "experts": (
        {"width": 512, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 16, "moe": SPARSE},
        {"max_num_batched_tokens": 1024, "max_num_seqs": 4, "num_blocks": 600}, "bfloat16",
    ),
    "logits": (
        {"vocab_size": 50000, "width": 64, "max_seq_len": 128},
        {"max_num_batched_tokens": 256, "max_num_seqs": 64}, "float32",
    ),
    "a chunk": ({"max_seq_len": 4096}, {"max_num_batched_tokens": 2048, "max_num_seqs": 4}, "bfloat16"),
    "next tokens": (
        {"max_seq_len": 2048, "head_dim": 64}, {"max_num_batched_tokens": 256, "max_num_seqs": 64}, "bfloat16",
    ),
    "int8": (
        {"max_seq_len": 2048, "head_dim": 64},
        {"max_num_batched_tokens": 256, "max_num_seqs": 64, "kv_dtype": "int8"}, "bfloat16",
    ),
    "latents": (
        {"kv_heads": 8, "attention": LATENT}, {"max_num_batched_tokens": 1024, "max_num_seqs": 4}, "float32",
    ),
    "biases": (
        {"attention": {"sinks": True, "positions": "relative"}},
        {"max_num_batched_tokens": 1024, "max_num_seqs": 4}, "float32",
    ),
    "biases written out": (  # the kernels in C++ have no float64
        {"attention": {"sinks": True, "positions": "relative"}},
        {"max_num_batched_tokens": 1024, "max_num_seqs": 4}, "float64",
    ),
    "a chunk written out": ({"max_seq_len": 4096}, {"max_num_batched_tokens": 1024, "max_num_seqs": 4}, "float64"),
    "a dense network": (
        {"ffn_width": 16384}, {"max_num_batched_tokens": 1024, "max_num_seqs": 4}, "bfloat16",
    ),
}  # fmt: skip


def measured(name: str) -> tuple[int, int]:
    """(peak, plan) of the worst steps in a process of its own, whose allocator returns what is freed."""
    model, config, dtype = WORST[name]
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    arguments = (json.dumps(PLAIN | model), json.dumps(config), dtype)
    found = subprocess.run(
        [sys.executable, "-m", "turnout.tests.helpers.worst_step", *arguments],
        env={**os.environ, **allocator, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    result = json.loads(found.stdout)
    return result["peak"], result["planned"]


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "experts" else pytest.mark.full) for n in WORST])
def test_M9_the_worst_step_takes_no_more_than_planned(name):
    """Every token of the budget goes to its experts here, at the model's longest, and everybody samples."""
    peak, planned = measured(name)
    assert peak <= planned
    assert planned - WORKSPACE <= 3 * peak, "a plan that is never needed would waste the machine"


def flood(path: str, config: dict[str, Any]) -> tuple[int, int, int] | None:
    """On every rank: two steps full of tokens, one a replica. Rank 0's (peak, plan, plan for its own tokens alone)."""
    ranks = Ranks(build_mesh(ParallelConfig(ep=2)), EngineConfig(**config))
    engine = Engine.from_path(path, EngineConfig(**config), ranks=ranks)
    if not ranks.leads:
        ranks.follow()
        return None
    one = SamplingParams(max_tokens=1, temperature=0)
    for tokens in (8, config["max_num_batched_tokens"]):  # the first to warm up
        before = start_peak()
        for replica in range(2):
            engine.add_request(str(replica), [1 + replica] * tokens, one)
        drain(engine)
    peak = resident("VmHWM") - before
    ranks.end()
    cfg, length = engine.model_config, engine.config.max_model_len
    own = Activations(model=cfg, config=engine.config, length=length, dtype=torch.float32)
    return peak, engine.memory_plan.activations, own.total


@pytest.mark.full
def test_M9_two_ranks_send_all_their_tokens_to_the_experts_of_one(tmp_path, byte_level):
    """Routers of zeros: ties go to the lowest experts, which rank 0 has."""
    moe = SPARSE | {"num_experts": 16, "top_k": 8}
    cfg = build(ModelConfig, PLAIN | {"width": 512, "layers": 2, "heads": 4, "kv_heads": 4, "head_dim": 16, "moe": moe})
    weights = Decoder(cfg).state_dict()
    zeros = {name: torch.zeros_like(weight) for name, weight in weights.items() if name.endswith("router.weight")}
    byte_level._tokenizer.save(str(tmp_path / "tokenizer.json"))
    path = save_model(tmp_path / "model", cfg, weights | zeros, tmp_path)
    config = {"max_num_batched_tokens": 1000, "max_num_seqs": 4, "num_blocks": 300, "enable_prefix_caching": False}
    allocator = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    (peak, planned, own), _ = run_ranks(flood, 2, str(path), config, fresh=True, env=allocator)
    assert own < peak <= planned


@pytest.mark.parametrize("capacity", ["dropless", "trained"])
def test_the_pages_of_routing_are_in_the_plan(make_model, capacity):
    moe = {"capacity_tokens": 64, "eval_capacity_factor": 2.0} if capacity == "trained" else {}
    model = make_model("gshard")
    cfg = replace(model.cfg, moe=replace(model.cfg.moe, **moe))
    config = EngineConfig(num_blocks=100, moe_capacity=capacity)
    found = plan_memory(cfg, config, 256, torch.float32, weights=0, free=1 << 40)
    pages = ExpertPages(cfg, 100, 16, torch.device("cpu"), counted=capacity == "trained")
    assert found.routing == sum(kept.nbytes for kept in (pages.ids, pages.taken) if kept is not None)


def test_the_sampler_takes_no_more_for_a_logit_than_planned():
    rows, vocabulary = 8, 20000
    params = SamplingParams(
        max_tokens=4, top_k=5000, top_p=0.999, min_p=1e-9, logprobs=5, repetition_penalty=1.2, presence_penalty=0.1,
        frequency_penalty=0.1, logit_bias={3: 1.0}, min_tokens=2, stop_token_ids=[4],
    )  # fmt: skip
    items = [
        Scheduled(Request(str(row), [1, 2, 3], params), 0, 3, token_ids=[1, 2, 3], block_table=(1,), samples=True)
        for row in range(rows)
    ]
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 0.01  # flat: all are sorted
    with Memory() as measured:
        sample(logits, items)
    assert 0.7 * SAMPLING < measured.peak / logits.numel() <= SAMPLING


def worst(cfg, **layout):
    return Activations(model=cfg, config=EngineConfig(), length=256, dtype=torch.float32, **layout)


def test_M9_every_token_of_all_ranks_may_go_to_the_experts_of_one(make_model):
    """512 tokens a replica, 2 of 4 experts each."""
    cfg = make_model("gshard").cfg
    alone, two, four = worst(cfg), worst(cfg, ranks=2), worst(cfg, ranks=4)
    assert (alone.rows, two.rows) == (512 * 2, 2 * 512 * 2), "every choice of both ranks' tokens"
    assert four.rows == 4 * 512 * 1, "a rank has one expert, and no token asks for it twice"
    assert worst(cfg, ranks=2, tp=2).rows == 512 * 2, "two ranks divide one replica's tokens"
    travelled = two.rows * 4 * 32 * 4  # to the expert and back, as they set out and as they arrive
    assert two.experts - alone.experts >= travelled + 512 * 2 * 32 * 4
    relu = replace(cfg, activation="relu")
    few_bits = replace(relu, quantization=QuantizationConfig())
    assert worst(few_bits, tp=2).dense - worst(few_bits).dense == 512 * 64 * 4, "hidden units are gathered"
    assert worst(relu, tp=2).dense == worst(relu).dense
    large = replace(cfg, vocab_size=100_000)
    assert worst(large, replicas=2).logits == 2 * worst(large).logits, "rank 0 samples for both"


def plan(model, free, length=256, **config):
    return plan_memory(model.cfg, EngineConfig(**config), length, torch.float32, weights=1000, free=free)


def test_a_cache_sized_by_memory_leaves_room_for_the_worst_step(model):
    whole = plan(model, 1 << 40)
    assert whole.kv.limit == "max_num_seqs"
    tight = int((whole.activations + whole.cache // 2) / SHARE["cpu"])
    found = plan(model, tight)
    assert found.kv.limit == "free memory"
    limit = int(tight * SHARE["cpu"])
    assert found.fits(limit)
    more = replace(found, kv=replace(found.kv, num_blocks=found.kv.num_blocks + 1))
    more = replace(more, routing=found.routing * more.kv.num_blocks // found.kv.num_blocks)
    assert more.kv.tokens > 256, "the longest sequence fits, so another block changes the cache alone"
    assert not more.fits(limit)
    assert found.total == 1000 + found.activations + found.kv.total_bytes + found.routing


def test_G4_what_would_run_out_after_ready_is_refused_with_numbers_and_fixes(model):
    need = plan(model, 1 << 40, num_blocks=100)
    size = need.activations + need.cache
    assert plan(model, size, num_blocks=100).fits(size)
    numbers = rf"memory \(a step {need.activations / MIB:.0f} MiB \+ cache 1 MiB\) must not exceed {size / MIB:.0f} MiB"
    with pytest.raises(ConfigError, match=f"{numbers}.*: lower max_num_batched_tokens, .* or num_blocks"):
        plan(model, size - 1, num_blocks=100)
    with pytest.raises(ConfigError, match="or kv_memory_mb"):
        plan(model, 64 * MIB, kv_memory_mb=64)
    with pytest.raises(ConfigError, match="must not exceed 0 MiB of the 1 MiB"):
        plan(model, MIB)


def test_the_plan_is_printed_and_written_with_all_its_numbers(model):
    found = plan(model, 1 << 34, num_blocks=100)
    assert str(found).startswith(f"memory: weights 0 MiB + a step {found.activations / MIB:.0f} MiB + cache 1 MiB = ")
    assert "free beside the weights 16384 MiB; KV cache: 100 blocks" in str(found)
    written = found.to_dict()
    assert written["total_bytes"] == sum(written[f"{part}_bytes"] for part in ("weights", "activations", "cache"))
    assert (written["kv_blocks"], written["kv_dtype"], written["kv_set_by"]) == (100, "float32", "num_blocks")


def test_this_machine_has_free_memory():
    with open("/proc/meminfo") as lines:
        machine = int(next(lines).split()[1]) * 1024
    assert 100 * MIB < free_memory(torch.device("cpu")) <= machine


def test_a_control_group_that_is_smaller_than_the_machine_counts(tmp_path):
    """Version 2: the smallest of the groups around the process; a cache of files can be dropped."""
    inner = tmp_path / "box" / "job"
    inner.mkdir(parents=True)
    (inner / "memory.max").write_text("max\n")
    (inner.parent / "memory.max").write_text("1000\n")
    (inner.parent / "memory.current").write_text("700\n")
    (inner.parent / "memory.stat").write_text("anon 400\ninactive_file 250\n")
    assert list(group_memory("0::/box/job\n", tmp_path)) == [550]
    (inner / "memory.max").write_text("400\n")
    (inner / "memory.current").write_text("500\n")
    assert min(group_memory("0::/box/job\n", tmp_path)) == 0


def test_a_control_group_of_version_1_counts_too(tmp_path):
    box = tmp_path / "memory" / "box"
    box.mkdir(parents=True)
    (box / "memory.limit_in_bytes").write_text("1000\n")
    (box / "memory.usage_in_bytes").write_text("300\n")
    assert list(group_memory("5:devices:/\n4:memory:/box\n0::/\n", tmp_path)) == [700]
    assert list(group_memory("4:memory:/elsewhere\n", tmp_path)) == [], "hidden from this process"
