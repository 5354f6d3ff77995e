"""`LLM` as users of vLLM know it."""

import json
import subprocess
import sys

import pytest

from turnout import LLM, CheckpointError, ConfigError, DataError, RequestError, SamplingParams
from turnout.inference.config import EngineConfig
from turnout.inference.text.tokenizer import TextTokenizer

GREEDY = SamplingParams(temperature=0, max_tokens=8)
PROMPTS = ["import os", "def push(self", "naïve café 👍🏽", "x"]


@pytest.fixture(scope="module")
def llm(model_dir):
    return LLM(model_dir, max_num_seqs=2, max_num_batched_tokens=16)


def test_outputs_come_in_the_order_of_the_prompts_and_equal_single_calls(llm):
    many = [SamplingParams(temperature=0, max_tokens=12 - 2 * i) for i in range(4)]  # the last finishes first
    outputs = llm.generate(PROMPTS, many)
    assert [output.prompt for output in outputs] == PROMPTS
    assert [len(output.outputs[0].token_ids) for output in outputs] == [12, 10, 8, 6]
    for prompt, params, output in zip(PROMPTS, many, outputs, strict=True):
        (single,) = llm.generate(prompt, params)
        assert single.outputs[0].text == output.outputs[0].text
        assert single.outputs[0].token_ids == output.outputs[0].token_ids
        assert single.finished


def test_a_prompt_is_text_or_tokens(llm, model_dir):
    ids = TextTokenizer.from_dir(model_dir).encode(PROMPTS[0])
    (by_text,), (by_ids,) = llm.generate(PROMPTS[0], GREEDY), llm.generate(ids, GREEDY)
    first, second = llm.generate([PROMPTS[0], ids], GREEDY)
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == ids
    assert (by_text.prompt, by_ids.prompt) == (PROMPTS[0], None)
    assert by_text.outputs == by_ids.outputs == first.outputs == second.outputs


def test_text_is_what_the_tokens_decode_to_and_logprobs_are_one_dict_a_token(llm, model_dir):
    tokenizer = TextTokenizer.from_dir(model_dir)
    params = SamplingParams(n=2, seed=3, max_tokens=10, logprobs=2)
    for output in llm.generate(PROMPTS, params):
        assert [choice.index for choice in output.outputs] == [0, 1]
        for choice in output.outputs:
            assert choice.text == tokenizer.decode(choice.token_ids)
            assert (
                [len(logprobs) in (2, 3) for logprobs in choice.logprobs]
                == [True] * len(choice.token_ids)
                == [True] * 10
            )


def test_more_prompts_than_a_server_would_queue(model_dir):
    prompts = [[i % 300 + 1] for i in range(EngineConfig().max_waiting + 1)]
    outputs = LLM(model_dir).generate(prompts, SamplingParams(max_tokens=1))
    assert [output.prompt_token_ids for output in outputs] == prompts


def test_one_bad_prompt_refuses_the_call_and_leaves_nothing(llm):
    with pytest.raises(RequestError, match="at least one token"):
        llm.generate([[1, 2], []], GREEDY)
    assert not llm.engine.has_unfinished
    with pytest.raises(RequestError, match=r"params \(1\) must be one, or one a prompt \(2\)"):
        llm.generate(["a", "b"], [GREEDY])
    assert llm.generate([], GREEDY) == []


def test_precision_is_an_option(model_dir):
    llm = LLM(model_dir, dtype="bfloat16")
    assert str(llm.engine.kv_plan.dtype) == "torch.bfloat16"
    assert len(llm.generate("import", GREEDY)[0].outputs[0].token_ids) == 8


def test_bad_options_and_directories_are_named(model_dir, tmp_path):
    with pytest.raises(ConfigError, match="did you mean block_size"):
        LLM(model_dir, blocksize=3)
    with pytest.raises(CheckpointError, match="holds no model"):
        LLM(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(json.loads((model_dir / "config.json").read_text())))
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        LLM(tmp_path)


def test_importing_the_package_and_its_torch_free_parts_loads_no_torch():
    code = """
import sys
import turnout, turnout.inference, turnout.inference.errors, turnout.inference.outputs
import turnout.inference.text.chat, turnout.inference.text.detokenizer, turnout.inference.text.stop
from turnout.inference import EngineConfig, SamplingParams
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
