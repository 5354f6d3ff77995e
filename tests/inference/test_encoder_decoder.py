"""Encoder-decoders: a request's prompt goes through the encoder once, and its output is that of a plain loop over the
model, whatever else runs, waits, is preempted or aborted beside it."""

import random

import pytest
import torch

from turnout import RequestError
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.outputs import RequestOutput
from turnout.moe import Decoder, RouteContext, VarlenContext
from turnout.moe.attention_config import AttentionConfig, EncoderConfig

START = 5
LENGTHS = (1, 2, 15, 16, 17, 33, 40)
GREEDY = SamplingParams(temperature=0, max_tokens=32, logprobs=0)


@pytest.fixture(scope="session")
def t5(make_model) -> Decoder:
    """T5's kind: relative positions, no gate in the dense slots, sparse blocks in both stacks."""
    return build(make_model)


def build(make_model, **changes) -> Decoder:
    values = {
        "layers": 2, "kv_heads": 4, "activation": "relu", "attention": AttentionConfig(positions="relative"),
        "encoder": EncoderConfig(layers=3, start_token_id=START, sparse_layers=(1, 2)), "seed": 3,
    }  # fmt: skip
    model = make_model(**(values | changes))
    with torch.no_grad():
        for block in model.blocks:
            block.cross.wo.weight.mul_(4)  # so that the input decides
    return model


def prompts(lengths=LENGTHS) -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(1, 321) for _ in range(length)] for length in lengths]


@torch.inference_mode()
def plainly(model: Decoder, prompt: list[int], count: int = 32) -> list[int]:
    """Greedy tokens, the whole sequence computed anew for each."""
    borders = torch.tensor([0, len(prompt)])
    route = RouteContext(cu_groups=borders, dropless=True)
    ids = torch.tensor(prompt)
    memory = model.encode(ids, torch.arange(len(prompt)), VarlenContext(borders, route))
    output = [START]
    for _ in range(count):
        own = torch.tensor([0, len(output)])
        route = RouteContext(cu_groups=own, dropless=True)
        context = VarlenContext(own, route, memory=memory, cu_memory_B1=borders)
        output.append(int(model(torch.tensor(output), torch.arange(len(output)), context)[-1].argmax()))
    return output[1:]


def complete(engine: Engine, work: list[tuple[list[int], SamplingParams]]) -> list[RequestOutput]:
    for i, (prompt, params) in enumerate(work):
        engine.add_request(str(i), prompt, params)
    last = {}
    while engine.has_unfinished:
        last |= {output.request_id: output for output in engine.step()}
    return [last[str(i)] for i in range(len(work))]


@pytest.mark.parametrize("sizes", [{}, {"num_blocks": 10, "max_num_batched_tokens": 42, "block_size": 16}])
def test_requests_of_all_lengths_give_the_tokens_of_a_plain_loop(t5, make_engine, sizes):
    engine = make_engine(t5, **sizes)
    outputs = complete(engine, [(prompt, GREEDY) for prompt in prompts()])
    texts = [output.outputs[0].token_ids for output in outputs]
    assert texts == [plainly(t5, prompt) for prompt in prompts()]
    assert [output.prompt_token_ids for output in outputs] == prompts()
    assert len(set(map(tuple, texts))) == len(texts), "the inputs decide"
    assert (engine.stats().preemptions > 0) == bool(sizes)
