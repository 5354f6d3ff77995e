"""How fast a layout can be: bytes and seconds by hand, and the bytes that ranks really send."""

from dataclasses import replace

import pytest

from turnout.configs.hardware import ACCELERATORS, NETWORKS, Accelerator, Network
from turnout.launch.forecast import LATENCY, Forecast
from turnout.moe.config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig
from turnout.moe.data.config import DataConfig
from turnout.moe.flops import flops_by_part, flops_per_token
from turnout.moe.train.config import RunConfig, TrainConfig
from turnout.parallel.config import Layout, ParallelConfig
from turnout.parallel.dispatch import travel
from turnout.tests.helpers.measured import start, step
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, tiny

TWO = Layout(dp=2, ep=2, edp=1)
MODEL = ModelConfig(
    vocab_size=300, width=4, layers=2, heads=2, kv_heads=1, head_dim=2, ffn_width=6, max_seq_len=4,
    moe=MoEConfig(width=4, expert_width=3, num_experts=2, capacity_factor=None),
)  # fmt: skip
SPREAD = RunConfig(
    model=MODEL,
    data=DataConfig(vocab_size=300),
    train=TrainConfig(global_batch=2, seq_len=4, dtype="float32"),
    parallel=ParallelConfig(ep=2),
)
DENSE = replace(SPREAD, model=replace(MODEL, moe=None), parallel=ParallelConfig())
MACHINE = Accelerator(bfloat16=2e6, float32=1e6, memory=5e4, bandwidth=1e5, link=1e3, node=2)


def of(config, layout, network=1.0, **machine):
    return Forecast(config, layout, replace(MACHINE, **machine), Network(bandwidth=network))


def test_two_ranks_by_hand():
    found = of(SPREAD, TWO)
    stage = found.slowest
    assert found.flops == 8 * 6 * (96 + 72 + 36 + 8 + 1200 + 32)
    assert stage.gradient_bytes == {"stage": 4 * 1396, "replicas": 0, "edp": 0}
    assert stage.exchange_bytes == 4 * 4 * 8 / 2
    assert stage.compute_seconds == pytest.approx(0.034656)
    assert stage.memory_seconds == pytest.approx((17184 + 35200 + 40248) / 1e5)
    assert stage.waits_seconds == pytest.approx(0.128 + 5 * LATENCY)
    assert found.exposed_seconds == pytest.approx(0.128 + 5 * LATENCY + 5.584 - 0.92632 * 2 / 3)
    assert found.seconds == pytest.approx(0.92632 + found.exposed_seconds)
    assert found.mfu == pytest.approx(0.034656 / found.seconds)
    assert found.fits
    assert not of(SPREAD, TWO, memory=3e4).fits


def test_traffic_between_nodes_by_hand():
    config = replace(SPREAD, train=replace(SPREAD.train, global_batch=8))
    layout = Layout(dp=8, ep=2, edp=4)
    stage = of(config, layout, 100.0).slowest
    assert stage.gradient_bytes["edp"] == 4 * 36 * 2 * 3 / 4
    assert stage.exchange_seconds == pytest.approx(64 * 2 / 1e3)  # both ranks in one node
    dense = 4 * 1396 * 2 * 7 / 8 / 200  # two ports a node
    assert stage.sum_seconds == pytest.approx(216 / 100 + dense - stage.busy_seconds * 2 / 3)
    assert of(config, layout, 100.0, node=1).slowest.exchange_seconds == pytest.approx(64 * 2 / 100)
    near = of(config, layout, 100.0, node=8).slowest
    assert near.sum_seconds == pytest.approx(216 / 1e3 + 4 * 1396 * 2 * 7 / 8 / 1e3 - stage.busy_seconds * 2 / 3)


def test_tensor_and_context_ranks_by_hand():
    stage = of(DENSE, Layout(dp=1, ep=1, edp=4, tp=2, cp=2), 100.0).slowest
    # 4 divided layers gather and scatter 4 attended rows of 4 numbers, half of which come from the other rank
    assert stage.tensor_bytes == 4 * 2 * 4 * 4 * 4 / 2
    assert stage.tensor_seconds == pytest.approx(2 * stage.tensor_bytes / 1e3)
    # 2 layers, 4 attended keys and values of one head of 2 numbers go to one other rank, in another node
    assert stage.context_bytes == 2 * 4 * 2 * 2 * 4
    assert stage.context_seconds == pytest.approx(2 * stage.context_bytes / 100)
    assert stage.rounds == 2 * (2 * 4 + 2)
    # W_q, W_o, W_in, W_out of both layers are summed over cp, the rest over all four
    assert stage.gradient_bytes == {"stage": 4 * 2 * 3 / 4 * 1252, "replicas": 4 * 104, "edp": 0}
    again = replace(DENSE, train=replace(DENSE.train, recompute="full"))
    twice = of(again, Layout(dp=1, ep=1, edp=4, tp=2, cp=2), 100.0).slowest
    assert twice.tensor_seconds == pytest.approx(1.5 * stage.tensor_seconds)
    attention, feed, head = flops_by_part(MODEL, 4, (0, 1))
    assert attention + feed + head == flops_per_token(MODEL, 4)


def test_latent_attention_by_hand():
    latent = AttentionConfig(latent=LatentConfig(rank=5, rope_dim=2, value_dim=3, query_rank=6))
    model = replace(MODEL, kv_heads=2, attention=latent, moe=None)
    stage = of(replace(DENSE, model=model), Layout(dp=1, ep=1, edp=2, tp=1, cp=2), 100.0).slowest
    # expanded before they travel: both heads' keys of 2 + 2 numbers and values of 3
    assert stage.context_bytes == 2 * 4 * 2 * (4 + 3) * 4
    # W_dq, W_uq, W_dkv, W_ukv, W_o; of 4 positions 2 are seen in the mean
    attention, _, _ = flops_by_part(model, 4, (0, 1))
    assert attention == 6 * 2 * (4 * 6 + 6 * 8 + 4 * 7 + 5 * 10 + 6 * 4 + 2 * (4 + 3) * 2)


def test_a_pipeline_by_hand():
    config = replace(
        DENSE, model=replace(DENSE.model, layers=4), train=replace(DENSE.train, global_batch=8, micro_batch=1)
    )
    for virtual in (1, 2):
        deep = replace(config, parallel=ParallelConfig(pp=2, virtual=virtual))
        found = of(deep, deep.layout(2), 100.0)
        slow = found.slowest
        assert slow.pipeline_bytes == 2 * virtual * 8 * 4 * 4 * 4
        assert slow.pipeline_seconds == pytest.approx(slow.pipeline_bytes / 1e3)
        work = slow.busy_seconds + slow.waits_seconds
        assert found.bubble_seconds == pytest.approx(work / (8 * virtual))
        assert found.seconds == pytest.approx(work * (1 + 1 / (8 * virtual)) + found.sum_seconds)
        assert slow.held.logits > 0  # the head is most of this model
    apart = of(deep, deep.layout(2), 100.0, node=1).slowest
    assert apart.pipeline_seconds == pytest.approx(apart.pipeline_bytes / 100)


def test_fsdp_by_hand():
    config = replace(SPREAD)
    object.__setattr__(config, "parallel", ParallelConfig(ep=2, fsdp=True))  # a run may refuse it still
    stage = of(config, TWO).slowest
    assert stage.gather_bytes == 2 * 4 * 1396 / 2
    assert stage.gather_seconds == pytest.approx(stage.gather_bytes / 1e3 - stage.busy_seconds)
    assert stage.gradient_bytes["stage"] == 4 * 1396 / 2
    assert stage.sum_seconds == pytest.approx(4 * 1396 / 2 / 1e3)


def measure_and_count(run: str, words: list[str]) -> tuple[int, float]:
    """The bytes that this rank gives to exchanges, forward and backward, those for itself included; and foretold."""
    sent: list[int] = []
    trainer, held = start(run, words)

    def leave(flight, rows_ND, leg, what):
        sent.append(rows_ND.nbytes)
        return real(flight, rows_ND, leg, what)

    real, travel._Flight.start = travel._Flight.start, leave
    try:
        step(trainer, held.config.micro_batches(held.layout.dp))
    finally:
        travel._Flight.start = real
    found = Forecast(held.config, held.layout, ACCELERATORS["cpu"], NETWORKS["eth10"])
    return sum(sent), found.slowest.exchange_bytes * 2 * 2  # half stays here; backward is as much


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_ranks_send_what_is_foretold(tmp_path, dtype):
    words = tiny(corpus(tmp_path), "train.seq_len=64", "moe=olmoe", "parallel.ep=2", f"train.dtype={dtype}")
    sent, foretold = (sum(each) for each in zip(*run_ranks(measure_and_count, 2, str(tmp_path), words), strict=True))
    assert foretold == sent > 0
