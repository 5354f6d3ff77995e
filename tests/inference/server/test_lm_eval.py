"""lm-evaluation-harness over HTTP: its `local-completions` finds what `turnout evaluate` and the model itself say.

Its tasks are made here, from the shipped text: which of four continuations is the true one, and rolling perplexity.
"""

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from turnout.inference.text.tokenizer import TextTokenizer
from turnout.launch.evaluate import EvaluateOptions, report
from turnout.moe import Decoder, ModelConfig, MoEConfig, VarlenContext, load_model, save_model
from turnout.moe.data.corpus import read_documents
from turnout.moe.data.tokenizer import Tokenizer, train_tokenizer
from turnout.moe.models.init import init_weights

from .conftest import Running, run_server

LENGTH = 256  # tokens of the longest sequence
WINDOW = LENGTH - 2  # what the harness predicts at once: it keeps one token for context and one to generate
ITEMS, WORDS, CHOICES = 24, 14, 4
CHOICE_TASK = {
    "output_type": "multiple_choice",
    "doc_to_text": "{{context}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{label}}",
    "metric_list": [{"metric": "acc"}],
}
ROLLING_TASK = {
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{text}}<|endoftext|>",
    "metric_list": [{"metric": "bits_per_byte"}],
}


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return read_documents("pydocs", "validation")


@pytest.fixture(scope="module")
def checkpoint(texts, tmp_path_factory) -> Path:
    """A small random model without drops in evaluation, with a tokenizer of the text."""
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = train_tokenizer(texts[:3], 400)
    tokenizer.save(folder / "tokenizer")
    moe = MoEConfig(width=32, expert_width=32, num_experts=4, eval_capacity_factor=None, init_scale=3.0)
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=4, kv_heads=2, head_dim=8, ffn_width=64,
        max_seq_len=LENGTH, tie_embeddings=False, moe=moe,
    )  # fmt: skip
    model = Decoder(config)
    init_weights(model, 0)
    return save_model(folder / "model", config, model.state_dict(), folder / "tokenizer")


@pytest.fixture(scope="module")
def tokenizer(checkpoint) -> Tokenizer:
    return Tokenizer.load(checkpoint)


@pytest.fixture(scope="module")
def scored(checkpoint) -> Iterator[Running]:
    model = load_model(checkpoint, "float32", "cpu").eval().requires_grad_(False)
    with run_server(model, TextTokenizer.from_dir(checkpoint), {}, num_blocks=512) as running:
        yield running


@pytest.fixture(scope="module")
def documents(texts, tokenizer) -> list[str]:
    """Some that fit into one window, and one that fills exactly two."""
    rng = random.Random(0)
    short = [text[at : at + 300] for text in texts[:8] for at in rng.sample(range(0, max(1, len(text) - 300)), 1)]
    long = next(
        text
        for end in range(800, len(texts[0]))
        if len(tokenizer.encode(text := texts[0][:end], add_special_tokens=False)) + 1 == 2 * WINDOW
    )
    return [*short, long]


@pytest.fixture(scope="module")
def items(texts) -> list[dict]:
    """Words of a text, their true continuation, and continuations of others."""
    rng = random.Random(1)

    def words(count: int) -> list[str]:
        found = rng.choice(texts).split()
        at = rng.randrange(len(found) - count)
        return found[at : at + count]

    found = []
    for _ in range(ITEMS):
        true, label = words(WORDS), rng.randrange(CHOICES)
        choices = [" ".join(words(WORDS // 2)) for _ in range(CHOICES)]
        choices[label] = " ".join(true[WORDS // 2 :])
        found.append({"context": " ".join(true[: WORDS // 2]), "choices": choices, "label": label})
    return found


@pytest.fixture
def harness(scored, checkpoint, tmp_path, monkeypatch):
    """Run one task over records; returns the harness's results and its samples, in order."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoint / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["split_special_tokens"] = False  # so that a text can spell its own end
    (folder / "tokenizer_config.json").write_text(json.dumps(config))

    def run(task: dict, records: list[dict], **model: object) -> tuple[dict, list[dict]]:
        data = tmp_path / "records.jsonl"
        data.write_text("".join(json.dumps(record) + "\n" for record in records))
        source = {"data_files": {"test": str(data)}, "cache_dir": str(tmp_path / "cache")}
        own = {"task": "own", "dataset_path": "json", "dataset_kwargs": source, "test_split": "test", "num_fewshot": 0}
        (tmp_path / "own.yaml").write_text(yaml.safe_dump(own | task))
        found = simple_evaluate(
            "local-completions",
            {"model": "tiny", "base_url": f"{scored.url}/v1/completions", "tokenizer": str(folder)}
            | {"tokenizer_backend": "huggingface", "max_length": LENGTH, "max_retries": 1}
            | model,
            tasks=["own"],
            task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
            bootstrap_iters=0,
        )
        samples = sorted(found["samples"]["own"], key=lambda sample: sample["doc_id"])
        assert [sample["doc_id"] for sample in samples] == list(range(len(records)))
        return found["results"]["own"], samples

    return run


def loglikelihood(model: Decoder, context: list[int], continuation: list[int]) -> float:
    """Nats of the continuation, by the forward pass of training."""
    ids_T = torch.tensor(context + continuation)
    with torch.no_grad():
        logits_TV = model(ids_T[:-1], torch.arange(len(ids_T) - 1), VarlenContext(torch.tensor([0, len(ids_T) - 1])))
    logprobs_TV = logits_TV.double().log_softmax(-1)
    return float(logprobs_TV.gather(1, ids_T[1:, None])[len(context) - 1 :].sum())


WAYS = [{"batch_size": 3, "num_concurrent": 4}, pytest.param({"batch_size": 1}, marks=pytest.mark.full)]


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_every_choice_has_the_loglikelihood_that_the_model_gives_it(harness, scored, tokenizer, items, way):
    results, samples = harness(CHOICE_TASK, items, **way)
    right = []
    for item, sample in zip(items, samples, strict=True):
        context = tokenizer.encode(item["context"], add_special_tokens=False)
        own = []
        for choice in item["choices"]:
            whole = tokenizer.encode(f"{item['context']} {choice}", add_special_tokens=False)
            assert whole[: len(context)] == context
            own.append(loglikelihood(scored.engine.runner.model, context, whole[len(context) :]))
        theirs = [float(response[0]) for (response,) in sample["resps"]]
        assert theirs == pytest.approx(own, abs=1e-4)
        right.append(own.index(max(own)) == item["label"])
    assert results["acc,none"] == sum(right) / len(right)
    assert 0 < sum(right) < len(right)


def test_rolling_perplexity_is_that_of_turnout_evaluate(harness, checkpoint, documents, tmp_path):
    _, samples = harness(ROLLING_TASK, [{"text": text} for text in documents], num_concurrent=4)
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps({"text": text, "split": "validation"}) + "\n" for text in documents))
    ours = report(checkpoint, EvaluateOptions(data=str(data), seq_len=WINDOW, dtype="float32"))
    nats = -sum(float(sample["resps"][0][0]) for sample in samples)
    assert math.exp(nats / ours["tokens"]) == pytest.approx(ours["perplexity"], rel=1e-6)
    assert ours["tokens"] > 2 * WINDOW + 8 * 20
