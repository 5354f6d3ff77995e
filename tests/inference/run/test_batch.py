"""A step plan as flat tensors."""

import pytest
import torch

from turnout.inference.core.request import Request
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.core.step import Scheduled, StepPlan
from turnout.inference.run.batch import build_batch

CPU = torch.device("cpu")


def scheduled(name: str, tokens: list[int], start: int, count: int, table: list[int]) -> Scheduled:
    request = Request(id=name, prompt_token_ids=tokens, params=SamplingParams())
    return Scheduled(request, start, count, tokens[start : start + count], table, start + count == len(tokens))


def test_decodes_and_chunks_lie_one_after_another_with_their_slots():
    decode = scheduled("decode", list(range(100, 106)), start=5, count=1, table=[3, 1])
    chunk = scheduled("chunk", list(range(200, 220)), start=2, count=4, table=[7, 2, 5, 4, 6])
    last = scheduled("last", list(range(300, 303)), start=0, count=3, table=[8])
    batch = build_batch(StepPlan((decode, chunk, last), 8, (), ()), 4, CPU)
    assert batch.tokens_T.tolist() == [105, 202, 203, 204, 205, 300, 301, 302]
    assert batch.positions_T.tolist() == [5, 2, 3, 4, 5, 0, 1, 2]
    assert batch.slots_T.tolist() == [1 * 4 + 1, 7 * 4 + 2, 7 * 4 + 3, 2 * 4, 2 * 4 + 1, 32, 33, 34]
    assert batch.cu_q_B1.tolist() == [0, 1, 5, 8]
    assert batch.context_lens_B.tolist() == [6, 6, 3]
    assert batch.block_tables_BM.tolist() == [[3, 1, 0, 0, 0], [7, 2, 5, 4, 6], [8, 0, 0, 0, 0]]
    assert batch.logit_rows_R.tolist() == [0, 7]
    assert [item.request.id for item in batch.sampling] == ["decode", "last"]


def test_a_token_that_is_not_known_yet_comes_from_the_step_before():
    request = Request(id="ahead", prompt_token_ids=[1, 2, 3], params=SamplingParams())
    item = Scheduled(request, 3, 1, [], [2], samples=True)
    batch = build_batch(StepPlan((item,), 1, (), ()), 4, CPU, newest={"ahead": 77, "other": 5})
    assert batch.tokens_T.tolist() == [77]
    assert batch.positions_T.tolist() == [3]
    assert batch.slots_T.tolist() == [2 * 4 + 3]


def test_new_inputs_of_an_encoder_are_packed_and_every_request_finds_its_own():
    def item(name: str, size: int, memory: list[int], encoded: int, table: list[int]) -> Scheduled:
        request = Request(name, [9], SamplingParams(), encoder_token_ids=range(10 * size, 11 * size))
        return Scheduled(request, 0, 1, [9], table, True, None, memory, encoded)

    old, new, shared = item("old", 6, [3, 1], 0, [2]), item("new", 5, [7, 4], 5, [5]), item("shared", 2, [8], 0, [6])
    last = item("last", 2, [8], 2, [9])
    batch = build_batch(StepPlan((old, new, last, shared), 11, (), ()), 4, CPU, encoder=True)
    memory = batch.memory
    assert memory.tokens_S.tolist() == [50, 51, 52, 53, 54, 20, 21]
    assert memory.positions_S.tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert memory.cu_N1.tolist() == [0, 5, 7]
    assert memory.slots_S.tolist() == [28, 29, 30, 31, 16, 32, 33]
    assert memory.tables_BM.tolist() == [[3, 1], [7, 4], [8, 0], [8, 0]]
    assert memory.lens_B.tolist() == [6, 5, 2, 2]
    assert batch.tokens_T.tolist() == [9] * 4
    assert build_batch(StepPlan((old,), 1, (), ()), 4, CPU).memory is None


@pytest.mark.parametrize("name", ["model", "t5"])
def test_no_work_is_an_ordinary_batch_of_no_tokens(name, request):
    from turnout.inference.config import EngineConfig
    from turnout.inference.run.kv import plan_kv
    from turnout.inference.run.runner import ModelRunner

    model = request.getfixturevalue(name)
    plan = plan_kv(model.cfg, EngineConfig(num_blocks=2), 64, torch.float32, 0)
    batch, logits_RV = ModelRunner(model, plan).forward(StepPlan((), 0, (), ()))
    assert batch.tokens_T.shape == (0,)
    assert logits_RV.shape == (0, model.cfg.vocab_size)
