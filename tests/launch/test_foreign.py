"""Hugging Face directories as they are, through LLM, generate, serve and evaluate: transformers' results."""

import json
import math
import shutil

import httpx
import pytest
import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from turnout import LLM, DataError, SamplingParams
from turnout.launch.main import main
from turnout.launch.server_process import serving
from turnout.moe.data.tokenizer import Tokenizer
from turnout.tests.helpers import foreign

PROMPT = "The import statement"
TEXTS = ["The import statement binds the results.", "naïve café"]


@pytest.fixture(scope="module", params=["llama", "mixtral"])
def both(request, tmp_path_factory):
    """A directory and the model that transformers makes of it."""
    folder = tmp_path_factory.mktemp("theirs") / request.param
    if request.param == "llama":
        foreign.make(
            folder, LlamaForCausalLM, LlamaConfig, num_attention_heads=3, num_key_value_heads=1, hidden_size=24
        )
        return folder, LlamaForCausalLM.from_pretrained(folder)
    foreign.make(folder, MixtralForCausalLM, MixtralConfig, num_local_experts=4, sliding_window=12)
    return folder, MixtralForCausalLM.from_pretrained(folder)


def greedy(model, ids, new):
    """Transformers' continuation, which ends at what generation_config.json says."""
    row = torch.tensor([ids])
    found = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=new)
    return found[0, len(ids) :].tolist()


def test_a_completion_is_theirs(both, capsys):
    folder, theirs = both
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    llm = LLM(folder, kv_memory_mb=8)
    assert llm.engine.config.max_model_len == 128
    assert theirs.generation_config.eos_token_id == [1, 3]
    assert llm.engine.model_config.eos_token_ids == (1, 3)
    (output,) = llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=24))
    wanted = greedy(theirs, ids, 24)
    assert output.prompt_token_ids == ids
    assert output.outputs[0].token_ids == wanted
    words = [f"prompt={PROMPT}", "max_tokens=24", "temperature=0", "engine.kv_memory_mb=8"]
    assert main(["generate", str(folder), *words]) == 0
    assert capsys.readouterr().out == output.outputs[0].text + "\n"


def test_a_text_ends_where_generation_config_says(both, tmp_path):
    folder, theirs = both
    copy = shutil.copytree(folder, tmp_path / "copy")
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    third = greedy(theirs, ids, 8)[2]
    (copy / "generation_config.json").write_text(json.dumps({"eos_token_id": third}))
    (output,) = LLM(copy, kv_memory_mb=8).generate(PROMPT, SamplingParams(temperature=0, max_tokens=8))
    assert output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids[-1] == third
    assert len(output.outputs[0].token_ids) <= 3


def test_a_chat_goes_through_their_template(both):
    folder, _ = both
    message = [{"role": "user", "content": "What is <|bot|> an import?"}]
    chat = LLM(folder, kv_memory_mb=8).engine.chat
    wanted = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )
    assert chat.render(message) == wanted


def test_the_server_answers(both, tmp_path):
    folder, theirs = both
    ids = AutoTokenizer.from_pretrained(folder)(PROMPT).input_ids
    with serving(folder, tmp_path) as url:
        body = {"model": folder.name, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        body = {"model": folder.name, "messages": [{"role": "user", "content": "import"}], "max_tokens": 4}
        chat = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert answer["choices"][0]["text"] == tokenizer.decode(greedy(theirs, ids, 12), skip_special_tokens=True)
    assert chat["usage"]["prompt_tokens"] == 2 + len(tokenizer("import", add_special_tokens=False).input_ids)


def test_an_evaluation_is_their_loss(both, tmp_path):
    folder, theirs = both
    data, report = tmp_path / "texts.jsonl", tmp_path / "report.json"
    data.write_text("".join(json.dumps({"text": text, "split": "validation"}) + "\n" for text in TEXTS))
    assert main(["evaluate", str(folder), f"data={data}", f"json={report}", "device=cpu"]) == 0
    tokenizer, nats, count = AutoTokenizer.from_pretrained(folder), 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([*tokenizer(text).input_ids, 0])
        with torch.no_grad():
            logits = theirs(ids[None, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
        count += len(ids) - 1
    found = json.loads(report.read_text())
    assert found["tokens"] == count
    assert found["loss"] == pytest.approx(nats / count, rel=1e-5)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)


def test_documents_of_a_tokenizer_that_begins_no_text_are_separated_by_its_end(tmp_path):
    foreign.write_tokenizer(tmp_path)
    assert Tokenizer.load(tmp_path).eos_id == 0
    state = json.loads((tmp_path / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.eos_id == 1
    assert tokenizer.encode_batch(["import"])[0].tolist() == [1, *tokenizer.encode("import", add_special_tokens=False)]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    with pytest.raises(DataError, match="names no other eos_token"):
        Tokenizer.load(tmp_path)
