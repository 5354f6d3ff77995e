"""Runs the worst steps of an engine and prints what they took at most beside what was planned, as JSON.

    python -m turnout.tests.helpers.worst_step '{"width": 64, ...}' '{"max_num_batched_tokens": 256, ...}' float32

The first argument changes a sparse model's configuration, the second is the engine's. The peak is the kernel's count of
resident pages, above what lay there once weights and cache had been touched.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

from turnout.configs.typed import build
from turnout.inference.config import EngineConfig
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.text.tokenizer import TextTokenizer
from turnout.moe import Decoder, ModelConfig

PROCESS = Path("/proc/self")


def resident(field: str) -> int:
    """Bytes of a line of /proc/self/status: VmRSS now, VmHWM at most."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def start_peak() -> int:
    """Let VmHWM start again from what is resident now, which is returned."""
    (PROCESS / "clear_refs").write_text("5")
    return resident("VmRSS")


def byte_tokenizer() -> tokenizers.Tokenizer:
    """A token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def drain(engine: Engine) -> None:
    while engine.has_unfinished:
        engine.step()


def main(model: str, config: str, dtype: str) -> None:
    cfg = build(ModelConfig, json.loads(model))
    net = Decoder(cfg).to(getattr(torch, dtype)).eval().requires_grad_(False)
    engine = Engine(net, TextTokenizer(byte_tokenizer()), build(EngineConfig, json.loads(config)))
    for pages in engine.runner.cache.pages:
        pages.fill_(1).zero_()
    longest, batch = engine.config.max_model_len, engine.config.max_num_seqs
    together = 4 + batch * engine.config.block_size // engine.config.max_num_batched_tokens
    flat = SamplingParams(temperature=1.0, top_p=0.999, logprobs=5, max_tokens=together, ignore_eos=True)
    told = replace(flat, max_tokens=1, prompt_logprobs=5)
    engine.add_request("warm", [1, 2, 3], flat)
    drain(engine)
    before = start_peak()
    engine.add_request("long", [1] * (longest - together), told)
    drain(engine)
    for i in range(batch):  # all at their longest at once: what they share is cached by now
        engine.add_request(str(i), [1] * (longest - together), flat)
    drain(engine)
    plan = engine.memory_plan
    print(json.dumps({"peak": resident("VmHWM") - before, "planned": plan.activations, "plan": str(plan)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
