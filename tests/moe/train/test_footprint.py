"""What a rank holds: the arithmetic by hand, and against real models, real optimizers and the real loop's memory."""

from dataclasses import replace

import pytest
import torch

from turnout.kernels.torch_ops import attention
from turnout.moe import shapes
from turnout.moe.config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig
from turnout.moe.data.config import DataConfig
from turnout.moe.models.decoder import Decoder
from turnout.moe.routing.capacity import capacity
from turnout.moe.routing.registry import ROUTERS
from turnout.moe.shapes import KVForm
from turnout.moe.train import attended, footprint
from turnout.moe.train.config import OptimConfig, RunConfig, TrainConfig
from turnout.moe.train.footprint import Footprint, mean_up_to
from turnout.moe.train.optim import build_optimizers
from turnout.parallel.config import Layout, ParallelConfig
from turnout.tests.helpers.measured import measure, measure_zero
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, tiny

ONE = Layout(dp=1, ep=1, edp=1)
TWO = Layout(dp=2, ep=2, edp=1)
MOE = MoEConfig(width=4, expert_width=3, num_experts=2, capacity_factor=None)
MODEL = ModelConfig(
    vocab_size=300, width=4, layers=2, heads=2, kv_heads=1, head_dim=2, ffn_width=6, max_seq_len=4, moe=MOE
)
RUN = RunConfig(
    model=MODEL, data=DataConfig(vocab_size=300), train=TrainConfig(global_batch=1, seq_len=4, dtype="float32")
)
SPREAD = replace(RUN, train=replace(RUN.train, global_batch=2), parallel=ParallelConfig(ep=2))
DEEP = replace(RUN, model=replace(MODEL, layers=8), train=replace(RUN.train, global_batch=8, micro_batch=1))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return corpus(tmp_path_factory.mktemp("corpus"))


def test_one_rank_by_hand():
    # embedding 1200; norms 4 · 4 + 4; attention 2 · (16 + 8 + 8 + 16); dense 48 + 24; experts 48 + 24; router 8
    held = Footprint(RUN, ONE)
    assert held.weights == held.gradients == 4 * 1468
    assert held.optimizer == 8 * 1468 + 4 * 19
    assert held.attention == 4 * (16 + 16 + 64) + 4 * 4 * 2 + 4 * 2 * 4 * 4
    assert held.feed_forward(6) == 4 * 4 * (4 + 4 * 6)
    assert held.sparse(MOE) == 4 * (16 + 40 + 20 + 16) + 4 * 4 * (4 + 4 * 3) + 4 * 4 * 4
    assert held.head == 4 * (2 * 16 + 16) + 4 * 1200
    assert held.activations == 5 * 4 * (2 * 16 + 4) + 2 * 544 + 448 + 688 + 4992 == 7936
    assert (held.casts, held.logits, held.buffers, held.workspace, held.kv_token) == (0, 4 * 300 * (4 + 4), 0, 0, 32)
    assert held.total == 2 * 5872 + 11820 + 7936 + 9600


def test_bfloat16_and_muon_by_hand():
    config = replace(RUN, train=replace(RUN.train, dtype="bfloat16"), optim=OptimConfig(name="muon"))
    held = Footprint(config, ONE, cpu=True)
    # matrices of blocks: 2 · 48 + 72; the experts' are cast one by one, the head's for a moment.
    # Of one shape: both w_in of 12 and 6 rows alone
    assert held.casts == 2 * 168
    assert held.logits == 2 * 300 * (4 + 2 * 4)
    assert held.sparse(MOE) == 4 * (16 + 40 + 20 + 16) + 4 * 2 * (4 + 2 * 3)
    assert held.optimizer == 4 * 240 + 8 * 1228 + 4 * 7
    assert held.workspace == 6 * 64  # wq and wo of both blocks, 4 x 4
    assert held.attention == 4 * (8 + 16 + 2 * 2 * 8 + 2 * 4 * 2)


def test_two_ranks_by_hand():
    held = Footprint(SPREAD, TWO)
    assert held.weights == 4 * (1468 - 36)
    assert held.activations == 7936 + 16 * 4
    assert (held.buffers, replace(held, collapsed=True).buffers) == (2 * 4 * 4 * 4, 2 * 8 * 4 * 4)
    assert replace(held, collapsed=True).activations == held.activations + 4 * (64 + 16)
    bounded = free(SPREAD, ep=2, exchange_rows=5, chunks=4)
    assert Footprint(bounded, TWO, collapsed=True).buffers == 2 * 5 * 4 * 4
    chunks = free(SPREAD, ep=2, chunks=4)
    assert Footprint(chunks, TWO, collapsed=True).buffers == (8 + 8 / 4) * 4 * 4


def free(config, **sizes):
    """The run in a layout that it may refuse: the formulas need not."""
    found = replace(config)
    object.__setattr__(found, "parallel", ParallelConfig(**sizes))
    return found


def test_tensor_and_context_ranks_by_hand():
    config = replace(RUN, model=replace(MODEL, moe=None))
    whole, held = Footprint(config, ONE), Footprint(config, Layout(dp=1, ep=1, edp=4, tp=2, cp=2))
    # W_q and W_o lose half of 16, W_in and W_out half of 48 and 24; one K/V head is shared, so W_k and W_v stay
    assert held.weights == whole.weights - 4 * 2 * (8 + 8 + 24 + 12)
    assert (held.read, held.attended, held.tokens) == (4, 2, 1)
    # gathered operand, cos and sin, three of one head; k and v of all 4 tokens; one logsumexp, a mask of 4 x 4
    assert held.attention == 2 * (16 + 16 + 24) + 4 * 2 * 4 * 2 + 2 * 4 + 4 * 16
    assert held.feed_forward(6, tp=2) == 2 * 4 * (4 + 4 * 3)
    assert (held.norm, held.head) == (36, 1 * (2 * 16 + 16) + 4800)


@pytest.mark.parametrize(
    ("schedule", "virtual", "kept"),
    [("gpipe", 1, [8, 8, 8, 8]), ("1f1b", 1, [4, 3, 2, 1]), ("1f1b", 2, [11, 9, 7, 5])],
)
def test_micro_batches_in_flight_by_hand(schedule, virtual, kept):
    config = replace(DEEP, parallel=ParallelConfig(pp=4, schedule=schedule, virtual=virtual))
    stages = [Footprint(config, config.layout(4), stage=stage) for stage in range(4)]
    assert [held.in_flight for held in stages] == kept
    assert sorted(layer for held in stages for layer in held.layers) == list(range(8))
    whole = Footprint(DEEP, ONE)
    twice = 1200 * 4  # the tied embedding
    assert sum(held.weights for held in stages) == whole.weights + twice
    last = stages[3]
    ends = (last.norm + last.head) * (8 if schedule == "gpipe" else 1)
    assert last.activations == last.blocks * kept[3] // virtual + ends
    assert stages[1].travelling == 2 * virtual * 8 * 4 * 4 * 4
    assert stages[0].travelling == last.travelling == (2 * virtual - 1) * 8 * 4 * 4 * 4
    assert stages[0].logits == 0
    cast = replace(config, train=replace(config.train, dtype="bfloat16"))
    # of the two blocks, one of them sparse: 2 · 48 + 72 + 72 numbers
    assert Footprint(cast, cast.layout(4), stage=0).casts == -(-2 * 240 * kept[0] // virtual)


def test_fsdp_by_hand():
    config = free(SPREAD, fsdp=True)
    held = Footprint(config, Layout(dp=2, ep=1, edp=2))
    # whole are five norms and a router, 28 numbers
    assert held.weights == held.gradients == 4 * (1440 / 2 + 28)
    # the embedding; of a block 48 + 72 twice, its gradient in two types, and the embedding's
    assert held.casts == 4 * 1200
    assert held.gathered == 4 * 4 * 120 + 4 * 1200
    spread = Footprint(free(SPREAD, ep=2, fsdp=True), TWO)
    assert spread.weights == 4 * (1368 / 2 + 36 + 28)
    half = replace(SPREAD, train=replace(SPREAD.train, dtype="bfloat16"))
    # the experts in bfloat16, which nothing divides
    assert Footprint(free(half, ep=2, fsdp=True), TWO).casts == 4 * 1200 + 2 * 36


def test_zero_by_hand():
    train = replace(SPREAD.train, dtype="float32")
    for stage, weights, gradients in ((1, 1432 + 698, 1432), (2, 1432 + 698, 698 + 36)):
        parallel = ParallelConfig(ep=2, zero=stage)
        held = Footprint(replace(SPREAD, engine="deepspeed", train=train, parallel=parallel), TWO)
        assert (held.weights, held.gradients) == (4 * weights, 4 * gradients)
        assert held.optimizer == 8 * (698 + 36) + 2 * 4
        assert held.buffers == footprint.BUCKET + 2 * 4 * 4 * 4


def test_zero_3_by_hand():
    held = {}
    for how in ("none", "full"):
        train = replace(SPREAD.train, dtype="float32", recompute=how)
        config = replace(SPREAD, engine="deepspeed", train=train, parallel=ParallelConfig(zero=3))
        held[how] = Footprint(config, Layout(dp=2, ep=1, edp=2))
    # pieces of 1468: the weights' and their copy; gathered are the ends and the sparse block
    assert (held["full"].weights, held["full"].gradients) == (4 * 2 * 734, 4 * 734)
    assert held["full"].optimizer == 8 * 734
    assert held["full"].casts == 4 * (1200 + 4 + 136)
    assert held["none"].casts == 4 * (1200 + 4 + 136) + 4 * (2 * 48 + 72 + 72)
    assert held["full"].buffers == footprint.BUCKET


def test_recomputing_by_hand():
    held = {how: Footprint(replace(RUN, train=replace(RUN.train, recompute=how)), ONE) for how in ("selective", "full")}
    # selective keeps the input alone of 4 tokens: of the dense slot 4 · 4 bytes each, of the experts beside the router
    selective = held["selective"]
    assert selective.activations == 5 * 144 + 2 * 544 + 64 + (368 + 64 + 64) + 4992
    assert selective.again(False) == 448 + 2 * 4 * 4 * 6
    assert held["full"].activations == 2 * 64 + 4 * 16 * 3 + 144 + 4992
    assert held["full"].again(True) == 288 + 544 + 688 + 2 * 4 * 4 * 3


def test_the_mean_of_what_finds_a_slot():
    assert mean_up_to(10, 8, 0) == 8
    assert mean_up_to(8, 10, 0) == 8
    draws = torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * 3 + 8
    assert mean_up_to(10, 8, 9) == pytest.approx(float(draws.clamp(max=10).mean()), abs=0.01)


def test_drops_of_even_tokens_are_the_routers():
    moe = replace(MOE, num_experts=8, capacity_factor=1.25, min_capacity=0)
    config = replace(RUN, model=replace(MODEL, moe=moe, max_seq_len=64), train=replace(RUN.train, seq_len=64))
    ids = torch.randint(8, (2000, 64), generator=torch.Generator().manual_seed(0))
    counts = torch.nn.functional.one_hot(ids, 8).sum(1).clamp(max=10)
    assert Footprint(config, ONE).sent(moe) == pytest.approx(float(counts.sum(1).float().mean()), abs=1)
    assert Footprint(config, ONE, collapsed=True).sent(moe) == 64


def test_latent_attention_by_hand():
    latent = LatentConfig(rank=5, rope_dim=2, value_dim=3, query_rank=6)
    model = replace(MODEL, kv_heads=2, attention=AttentionConfig(latent=latent))
    # x; the latents' norms and what they go into; cos and sin; q 2 · 4; o and operand of W_o; k, v by head and k again
    kept = 4 * 4 * 4 + 4 * (12 * 11 + 2 * 4) + 4 * (16 + 4 * (8 + 12)) + 4 * 4 * 2 * (2 + 3 + 4)
    assert Footprint(replace(RUN, model=model), ONE).attention == kept + 4 * 4 * 2 + 4 * 4 * 4


def test_keys_and_values_of_a_token():
    assert KVForm(layers=61, heads=8, key_dim=128, value_dim=128).numbers * 2 == 249_856
    v2 = KVForm(layers=60, heads=1, key_dim=512 + 64, value_dim=512, shared=True)
    assert v2.numbers == 34_560  # DeepSeek-V2
    assert KVForm(layers=60, heads=128, key_dim=128, value_dim=128).numbers / v2.numbers == pytest.approx(56.9, abs=0.1)
    latent = AttentionConfig(latent=LatentConfig(rank=5, rope_dim=2, value_dim=3))
    config = replace(RUN, model=replace(MODEL, kv_heads=2, attention=latent))
    assert Footprint(config, ONE).kv_token == 2 * (5 + 2) * 4


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("changes", [{}, {"activation": "relu", "shared_experts": 2, "shared_gate": True}], ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_names_and_shapes_are_the_decoder_s(router, changes, tied):
    moe = MoEConfig(width=4, expert_width=3, num_experts=4, router=router, noncausal=True, **changes)
    cfg = replace(MODEL, moe=moe, tie_embeddings=tied)
    with torch.device("meta"):
        model = Decoder(cfg)
    assert shapes.shapes(cfg) == {name: tuple(weight.shape) for name, weight in model.named_parameters()}


@pytest.mark.parametrize(
    ("optim", "dtype"),
    [("adamw", "float32"), ("muon", "float32"), ("adafactor", "float32"), ("adamw", "bfloat16"), ("muon", "bfloat16")],
)
@pytest.mark.parametrize("moe", [MOE, None], ids=["sparse", "dense"])
def test_weights_gradients_and_optimizer_are_exact(optim, dtype, moe):
    config = replace(RUN, model=replace(MODEL, moe=moe), optim=OptimConfig(name=optim, state_dtype=dtype))
    model, held = Decoder(config.model), Footprint(config, ONE)
    optimizers = build_optimizers(model, config.optim)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    assert held.weights == sum(weight.nbytes for weight in model.parameters())
    assert held.gradients == sum(weight.grad.nbytes for weight in model.parameters())
    for optimizer in optimizers:
        optimizer.step()
    kept = [value for optimizer in optimizers for state in optimizer.state.values() for value in state.values()]
    assert held.optimizer == sum(tensor.nbytes for tensor in kept if isinstance(tensor, torch.Tensor))


@pytest.mark.parametrize(
    "words",
    [
        ["moe=switch"],
        ["moe=gshard"],
        ["moe=switch", "train.dtype=float32"],
        ["moe=gshard", "train.dtype=float32", "train.micro_batch=2", "moe.every=1"],
        ["moe=qwen2_moe"],
        ["moe=deepseek_v3"],
        ["moe=shazeer"],
        ["moe=jacobs"],
        ["moe=hash"],
        ["moe=expert_choice", "moe.noncausal=true"],
        ["moe.activation=relu", "moe.expert_dropout=0.1"],
        ["moe.activation=gelu", "model.tie_embeddings=false", "model.kv_heads=2"],
        ["model.moe=null"],
        ["train.recompute=selective", "model.layers=6", "moe=olmoe"],
        ["train.recompute=full", "model.layers=6", "moe=olmoe", "train.dtype=float32"],
    ],
    ids=" ".join,
)
def test_what_the_loop_keeps_is_foretold(data, tmp_path, words):
    found = measure(str(tmp_path), tiny(data, "train.seq_len=64", "moe.expert_width=96", *words))
    for what in ("lasting", "states"):
        measured, foretold = found.pop(what)
        assert measured == foretold, what
    assert all(foretold == pytest.approx(measured, rel=0.155) for measured, foretold in found.values()), found


@pytest.mark.full
@pytest.mark.parametrize("how", ["none", "selective", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("moe", ["moe=olmoe", "moe=deepseek_v3", "model.moe=null"])
def test_what_deeper_models_keep_is_foretold(data, tmp_path, how, dtype, moe):
    words = ["train.seq_len=64", "moe.expert_width=96", "model.layers=6", f"train.recompute={how}"]
    found = measure(str(tmp_path), tiny(data, *words, f"train.dtype={dtype}", moe))
    for measured, foretold in found.values():
        assert foretold == pytest.approx(measured, rel=0.15), found


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_drops_a_wider_model_is_foretold_closely(data, tmp_path, dtype):
    wide = ["model=small", "train.seq_len=256", "train.micro_batch=2", "moe=olmoe", f"train.dtype={dtype}"]
    measured, foretold = measure(str(tmp_path), tiny(data, *wide))["kept"]
    assert foretold == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    "words",
    [
        ["parallel.ep=2"],
        ["parallel.cp=2", "parallel.ep=2", "train.recompute=full", "train.dtype=float32"],
        pytest.param(["parallel.tp=2", "moe.every=2"], marks=pytest.mark.full),
        ["parallel.tp=2", "model.kv_heads=2", "train.dtype=float32", "model.moe=null"],
        pytest.param(["parallel.pp=2", "model.layers=4", "train.micro_batch=1"], marks=pytest.mark.full),
        ["parallel.pp=2", "model.layers=4", "train.micro_batch=1", "parallel.schedule=gpipe", "train.recompute=full"],
        ["train.micro_batch=1"],
        pytest.param(["parallel.fsdp=true", "train.micro_batch=1"], marks=pytest.mark.full),
        ["parallel.fsdp=true", "parallel.ep=2"],
        pytest.param(["parallel.fsdp=true", "train.dtype=float32", "model.layers=6"], marks=pytest.mark.full),
        pytest.param(
            ["parallel.fsdp=true", "parallel.ep=2", "train.recompute=full", "model.layers=6", "train.micro_batch=1"],
            marks=pytest.mark.full,
        ),
    ],
    ids=" ".join,
)
def test_two_ranks_keep_what_is_foretold(data, tmp_path, words):
    settings = tiny(data, "train.seq_len=64", "moe=olmoe", *words)
    ranks = run_ranks(measure, 2, str(tmp_path), settings)
    for what in ("lasting", "states", "kept", "peak"):
        measured, foretold = (sum(each) for each in zip(*(rank[what] for rank in ranks), strict=True))
        assert foretold == pytest.approx(measured, rel=0 if what in ("lasting", "states") else 0.15), what


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2])
def test_zero_holds_what_is_foretold(data, tmp_path, stage):
    words = ["train.seq_len=64", "moe=olmoe", "parallel.ep=2", "optim=adamw"]
    settings = tiny(data, *words, "engine=deepspeed", f"parallel.zero={stage}")
    ranks = run_ranks(measure_zero, 2, str(tmp_path), settings, fresh=True, env={"DS_ACCELERATOR": "cpu"})
    for rank in ranks:
        measured, foretold = rank["lasting"]
        assert 0 <= measured - foretold <= 64  # its pieces are padded
        measured, foretold = (size - footprint.BUCKET for size in rank["peak"])
        assert foretold == pytest.approx(measured, rel=0.15)


def test_formulas_that_are_written_twice_agree():
    assert attended.EXPLICIT == attention.EXPLICIT
    for factor in (1.1, 1.25, 0.3):
        moe = replace(MOE, capacity_factor=factor, num_experts=3, min_capacity=2)
        config = replace(RUN, model=replace(MODEL, moe=moe, max_seq_len=100))
        for length in (3, 50, 100):
            one = Footprint(replace(config, train=replace(RUN.train, seq_len=length)), ONE)
            assert one.slots(moe) == capacity(length, 1, 3, factor, 2)
