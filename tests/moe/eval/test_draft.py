"""A draft's acceptance is the formula's, and the lengths that follow from it are those of drawing."""

import pytest
import torch

from turnout import ConfigError, DataError
from turnout.moe.config import ModelConfig
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.eval.draft import Acceptance, acceptance
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.init import init_weights

TEXTS = ["the quick brown fox jumps over the lazy dog", "a second text that is a little longer than the first one"]


def model(seed: int, **changes) -> Decoder:
    sizes = {"vocab_size": 270, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_width": 16}
    made = Decoder(ModelConfig(**{**sizes, "max_seq_len": 16, **changes}))
    init_weights(made, seed)
    with torch.no_grad():
        made.embed.weight.mul_(20)  # far from uniform
    return made


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 270)


def test_it_is_the_overlap_of_both_distributions(tokenizer):
    target, draft = model(0), model(1)
    found = acceptance(target, draft, tokenizer, TEXTS, seq_len=16, batch=2)
    taken, same = [], []
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        for begin in range(0, len(ids) - 1, 16):
            tokens = torch.tensor(ids[begin : min(begin + 16, len(ids) - 1)])
            context = [VarlenContext(torch.tensor([0, len(tokens)], dtype=torch.int32)) for _ in range(2)]
            p, q = (
                m(tokens, torch.arange(len(tokens)), ctx).softmax(-1)
                for m, ctx in zip((target, draft), context, strict=True)
            )
            taken += [
                sum(min(a, b) for a, b in zip(x, y, strict=True)) for x, y in zip(p.tolist(), q.tolist(), strict=True)
            ]
            same += (p.argmax(-1) == q.argmax(-1)).tolist()
    assert found.tokens == len(taken)
    assert found.rate == pytest.approx(sum(taken) / len(taken), rel=1e-5)
    assert found.greedy == pytest.approx(sum(same) / len(same))
    assert 0.01 < found.rate < 0.99
    itself = acceptance(target, target, tokenizer, TEXTS, seq_len=16)
    assert itself.rate == pytest.approx(1, abs=1e-5)
    assert itself.greedy == 1


def test_lengths_are_those_of_drawing():
    alpha, drafted = 0.7, 4
    drawn = torch.rand(200_000, drafted, generator=torch.Generator().manual_seed(0)) < alpha
    mean = float((drawn.cumprod(1).sum(1) + 1).double().mean())
    found = Acceptance(rate=alpha, greedy=0.5, tokens=1).length(drafted)
    assert found == pytest.approx((1 - alpha ** (drafted + 1)) / (1 - alpha))
    assert found == pytest.approx(mean, rel=0.01)
    assert Acceptance(rate=1.0, greedy=1.0, tokens=1).length(drafted) == drafted + 1


def test_what_can_not_be_compared_is_refused(tokenizer):
    target = model(0)
    with pytest.raises(ConfigError, match=r"draft \(271\) must be the vocabulary of the target \(270\)"):
        acceptance(target, model(1, vocab_size=271), tokenizer, TEXTS, seq_len=16)
    with pytest.raises(ConfigError, match=r"seq_len \(16\) can not exceed draft's max_seq_len \(8\)"):
        acceptance(target, model(1, max_seq_len=8), tokenizer, TEXTS, seq_len=16)
    with pytest.raises(DataError, match="no text"):
        acceptance(target, target, tokenizer, [""], seq_len=16)
