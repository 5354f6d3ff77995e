"""Held-out loss: every token once, however the work is cut, batched or shared."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from turnout import ConfigError, DataError, NonFiniteError
from turnout.moe.config import ModelConfig, MoEConfig
from turnout.moe.data.corpus import read_documents
from turnout.moe.data.tokenizer import train_tokenizer
from turnout.moe.eval.perplexity import cut, evaluate, limit_bytes
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.init import init_weights
from turnout.parallel.apply import parallelize
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import Mesh, build_mesh
from turnout.tests.helpers.ranks import run_ranks

TEXTS = [text[:n] for text, n in zip(read_documents("pydocs", "validation"), (700, 1, 40, 333, 20), strict=False)]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 320)


def build(vocab_size, router="switch", **moe):
    options = {"capacity_factor": 1.0, "eval_capacity_factor": 1.0, "capacity_tokens": 16, "min_capacity": 1} | moe
    sparse = MoEConfig(
        width=16, expert_width=8, num_experts=4, top_k=2 if router == "gshard" else 1, router=router, **options
    )
    cfg = ModelConfig(
        vocab_size=vocab_size,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_dim=8,
        ffn_width=32,
        max_seq_len=64,
        moe=sparse,
    )
    model = Decoder(cfg)
    init_weights(model, 0)
    return model


def test_a_router_of_nan_raises_alone_and_is_summed_among_several_ranks(tokenizer):
    model = build(tokenizer.vocab_size)
    with torch.no_grad():
        model.blocks[1].ffn.router.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="layer 1"):
        evaluate(model, tokenizer, TEXTS[:1], seq_len=8)
    among_two = dataclasses.replace(Mesh.alone(torch.device("cpu")), world=2)
    assert math.isnan(evaluate(model, tokenizer, TEXTS[:1], seq_len=8, mesh=among_two).val_loss)


@pytest.mark.parametrize(("seq_len", "stride"), [(1, 1), (2, 1), (5, 5), (5, 2), (5, 4), (100, 30)])
@pytest.mark.parametrize("length", [2, 3, 5, 6, 7, 11, 31])
def test_every_token_but_the_first_is_scored_exactly_once_with_enough_context(seq_len, stride, length):
    documents = [np.arange(length), np.arange(1000, 1003)]
    windows = cut(documents, seq_len, stride)
    scored = [int(i) for w in windows for i in w.ids[w.scored + 1 :]]
    assert scored == [*range(1, length), 1001, 1002]
    for window in windows:
        assert 1 <= len(window.ids) - 1 <= seq_len
        if window.ids[0] not in (0, 1000):
            assert window.scored == seq_len - stride
    assert [w.first for w in windows] == np.cumsum([0, *(len(w.ids) - 1 for w in windows[:-1])]).tolist()


@pytest.mark.parametrize("stride", [None, 5])
@pytest.mark.parametrize("router", ["switch", "gshard"])
def test_the_loss_is_that_of_one_window_after_another(tokenizer, router, stride):
    model = build(tokenizer.vocab_size, router).eval()
    nats = tokens = 0.0
    for text in TEXTS:
        ids = [*tokenizer.encode(text), tokenizer.eos_id]
        begin = done = 0
        while done < len(ids) - 1:
            window = torch.tensor(ids[begin : begin + 13])
            inputs, targets = window[:12], torch.tensor(ids[begin + 1 : begin + 13])
            inputs = inputs[: len(targets)]
            logits = model(inputs, torch.arange(len(inputs)), VarlenContext(torch.tensor([0, len(inputs)]))).double()
            losses = F.cross_entropy(logits, targets, reduction="none")[done - begin :]
            nats, tokens = nats + losses.sum().item(), tokens + len(losses)
            done, begin = begin + len(inputs), begin + (stride or 12)
    result = evaluate(model, tokenizer, TEXTS, seq_len=12, stride=stride, batch=4)
    assert result.tokens == tokens == sum(len(tokenizer.encode(t)) for t in TEXTS)
    assert result.val_loss == pytest.approx(nats / tokens, rel=1e-6)
    assert result.bytes == sum(len(t.encode()) for t in TEXTS)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / result.bytes, rel=1e-6)


def test_an_undecided_model_needs_log2_v_bits_a_token(tokenizer):
    model = build(tokenizer.vocab_size)
    with torch.no_grad():
        model.embed.weight.zero_()
    result = evaluate(model, tokenizer, ["é", "ab"], seq_len=8)
    tokens = len(tokenizer.encode("é")) + len(tokenizer.encode("ab"))
    assert result.val_loss == pytest.approx(math.log(tokenizer.vocab_size), rel=1e-6)
    assert result.bits_per_byte == pytest.approx(tokens * math.log2(tokenizer.vocab_size) / 4, rel=1e-6)


def test_batching_changes_nothing(tokenizer):
    model = build(tokenizer.vocab_size)
    results = [evaluate(model, tokenizer, TEXTS, seq_len=12, batch=batch) for batch in (1, 3, 1000)]
    assert [r.val_loss for r in results] == pytest.approx([results[0].val_loss] * 3, rel=1e-6)
    assert len({tuple(e.expert_load for e in r.experts) for r in results}) == 1
    assert len({tuple(e.drop_fraction for e in r.experts) for r in results}) == 1


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_its_gradients(tokenizer, training):
    model = build(tokenizer.vocab_size).train(training)
    evaluate(model, tokenizer, TEXTS[:2], seq_len=12)
    assert all(module.training is training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_dropless_ignores_the_capacity(tokenizer):
    model = build(tokenizer.vocab_size, eval_capacity_factor=0.25)
    (bounded,) = evaluate(model, tokenizer, TEXTS, seq_len=12).experts
    (free,) = evaluate(model, tokenizer, TEXTS, seq_len=12, dropless=True).experts
    assert bounded.drop_fraction > 0
    assert free.drop_fraction == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 65}, r"seq_len \(65\) must lie in 1 to model\.max_seq_len \(64\)"),
        ({"seq_len": 0}, "seq_len"),
        ({"seq_len": 8, "stride": 9}, "stride"),
        ({"seq_len": 8, "stride": 0}, "stride"),
        ({"seq_len": 8, "batch": 0}, "batch"),
    ],
)
def test_lengths_that_do_not_fit_are_refused(tokenizer, options, message):
    with pytest.raises(ConfigError, match=message):
        evaluate(build(tokenizer.vocab_size), tokenizer, TEXTS, **options)


def test_no_text_is_refused(tokenizer):
    with pytest.raises(DataError, match="no text"):
        evaluate(build(tokenizer.vocab_size), tokenizer, ["", ""], seq_len=8)


def shared(batch, router="switch", **sizes):
    """Evaluate on all ranks; counts this rank's forward calls and the empty ones among them."""
    tokenizer = train_tokenizer(TEXTS, 320)
    whole = build(tokenizer.vocab_size, router)
    mesh = build_mesh(ParallelConfig(**sizes))
    parallelize(whole, mesh)
    init_weights(whole, 0)
    calls = []
    whole.register_forward_pre_hook(lambda _module, inputs: calls.append(len(inputs[0])))
    result = evaluate(whole, tokenizer, TEXTS, seq_len=12, stride=9, batch=batch, mesh=mesh)
    loads = [(e.expert_load, e.dead_experts, e.drop_fraction, e.router_entropy) for e in result.experts]
    return result.val_loss, result.bits_per_byte, result.tokens, loads, len(calls), calls.count(0)


def shared_by(sizes, *args):
    return shared(*args, **sizes)


def assert_same_report(ours, expected):
    assert ours[:3] == pytest.approx(expected[:3], rel=1e-6)
    for our, their in zip(ours[3], expected[3], strict=True):
        assert our[:3] == their[:3]
        assert our[3] == pytest.approx(their[3], rel=1e-6)


def test_ranks_share_the_work_with_equal_numbers_of_calls_and_agree():
    expected = shared(3)
    assert expected[3][0][2] > 0  # drops, so that the groups count
    for ep in (1, 2):
        for batch in (3, 1000):
            first, second = run_ranks(shared_by, 2, {"ep": ep}, batch)
            assert first[:3] == second[:3]
            assert_same_report(first, expected)
            assert first[4] == second[4]
            assert first[5] == 0
            assert batch == 3 or (second[4], second[5]) == (1, 1)  # all fits into rank 0's batch: rank 1 gets no token


@pytest.mark.parametrize("router", ["switch", "gshard"])
@pytest.mark.parametrize(
    ("world", "sizes"),
    [
        (2, {"cp": 2, "ep": 2}),
        pytest.param(4, {"cp": 2, "ep": 4}, marks=pytest.mark.full),
        pytest.param(4, {"cp": 4}, marks=pytest.mark.full),
    ],
)
def test_ranks_that_divide_a_rows_tokens_agree_with_one(world, sizes, router):
    expected = shared(3, router)
    for batch in (3, 1000):  # the larger leaves a second data-parallel rank without a window: padding alone
        for rank in run_ranks(shared_by, world, sizes, batch, router):
            assert_same_report(rank, expected)
            assert rank[5] == 0


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, ["aé", "bc", "d"]),
        (0, []),
        (1, ["a"]),
        (2, ["a"]),
        (3, ["aé"]),
        (4, ["aé", "b"]),
        (99, ["aé", "bc", "d"]),
    ],
)
def test_a_limit_of_bytes_keeps_whole_characters(limit, expected):
    assert limit_bytes(["aé", "bc", "d"], limit) == expected
