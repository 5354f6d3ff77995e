"""`turnout plan`: the arithmetic by hand, against real models, real optimizers and the real loop's saved tensors."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turnout import ConfigError
from turnout.configs.hardware import ACCELERATORS, NETWORKS, Accelerator, Network, accelerator
from turnout.kernels.torch_ops import attention
from turnout.launch import forecast
from turnout.launch.compose import compose
from turnout.launch.main import main
from turnout.moe import shapes
from turnout.moe.config import ModelConfig, MoEConfig
from turnout.moe.data.config import DataConfig
from turnout.moe.models.decoder import Decoder
from turnout.moe.routing.capacity import capacity
from turnout.moe.routing.registry import ROUTERS
from turnout.moe.train import footprint
from turnout.moe.train.config import OptimConfig, RunConfig, TrainConfig
from turnout.moe.train.footprint import Footprint
from turnout.moe.train.loop import Trainer
from turnout.moe.train.optim import build_optimizers
from turnout.parallel import process
from turnout.parallel.config import Layout, ParallelConfig
from turnout.parallel.dispatch import travel
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, tiny

ONE = Layout(dp=1, ep=1, edp=1)
TWO = Layout(dp=2, ep=2, edp=1)
MOE = MoEConfig(width=4, expert_width=3, num_experts=2)
MODEL = ModelConfig(
    vocab_size=300, width=4, layers=2, heads=2, kv_heads=1, head_dim=2, ffn_width=6, max_seq_len=4, moe=MOE
)
RUN = RunConfig(
    model=MODEL, data=DataConfig(vocab_size=300), train=TrainConfig(global_batch=1, seq_len=4, dtype="float32")
)
SPREAD = replace(RUN, train=replace(RUN.train, global_batch=2), parallel=ParallelConfig(ep=2))
MACHINE = Accelerator(bfloat16=2e6, float32=1e6, memory=5e4, bandwidth=1e5, link=1e3, node=2)


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
    assert held.head == 4 * (16 + 1200 + 16)
    assert held.activations == 5 * 4 * (2 * 16 + 4) + 2 * 544 + 448 + 688 + 4928 == 7872
    assert (held.casts, held.logits, held.buffers, held.workspace, held.kv_token) == (0, 4800, 0, 0, 32)
    assert held.total == 2 * 5872 + 11820 + 7872 + 4800


def test_bfloat16_and_muon_by_hand():
    config = replace(RUN, train=replace(RUN.train, dtype="bfloat16"), optim=OptimConfig(name="muon"))
    held = Footprint(config, ONE, cpu=True)
    # matrices of blocks: 2 · 48 + 72 + 72; the tied head is cast too. Of one shape: both w_in of 12 and 6 rows alone
    assert held.casts == 2 * (240 + 1200)
    assert held.optimizer == 4 * 240 + 8 * 1228 + 4 * 7
    assert held.workspace == 6 * 64  # wq and wo of both blocks, 4 x 4
    assert held.attention == 4 * (3 * 8 + 16 + 2 * 2 * 8 + 2 * 4 * 2)
    assert held.logits == 4 * 300 * 6


def test_two_ranks_by_hand():
    held = Footprint(SPREAD, TWO)
    assert held.weights == 4 * (1468 - 36)
    assert held.activations == 7872 + 16 * 4
    assert (held.buffers, replace(held, collapsed=True).buffers) == (2 * 4 * 4 * 4, 2 * 8 * 4 * 4)
    assert replace(held, collapsed=True).activations == held.activations + 4 * (64 + 16)
    found = forecast.Forecast(SPREAD, TWO, MACHINE, Network(bandwidth=1.0))
    assert found.flops == 8 * 6 * (96 + 72 + 36 + 8 + 1200 + 32)
    assert (found.dense_bytes, found.expert_bytes, found.exchange_bytes) == (4 * 1396, 0, 4 * 4 * 8 / 2)
    assert found.compute_seconds == pytest.approx(0.034656)
    assert found.memory_seconds == pytest.approx((17184 + 25472 + 40248) / 1e5)
    assert found.exposed_seconds == pytest.approx(0.128 + 5.584 - 0.82904 * 2 / 3)
    assert found.seconds == pytest.approx(0.82904 + found.exposed_seconds)
    assert found.mfu == pytest.approx(0.034656 / found.seconds)
    assert found.fits
    assert not replace(found, accelerator=replace(MACHINE, memory=3e4)).fits


def test_traffic_between_nodes_by_hand():
    config = replace(SPREAD, train=replace(SPREAD.train, global_batch=8))
    found = forecast.Forecast(config, Layout(dp=8, ep=2, edp=4), MACHINE, Network(bandwidth=100.0))
    assert found.expert_bytes == 4 * 36 * 2 * 3 / 4
    assert found.exchange_seconds == pytest.approx(64 * 2 / 1e3)  # both ranks in one node
    dense = 4 * 1396 * 2 * 7 / 8 / 200  # two ports a node
    busy = max(found.compute_seconds, found.memory_seconds)
    assert found.exposed_seconds == pytest.approx(0.128 + 216 / 100 + dense - busy * 2 / 3)
    apart = replace(found, accelerator=replace(MACHINE, node=1))
    assert apart.exchange_seconds == pytest.approx(64 * 2 / 100)
    near = replace(found, accelerator=replace(MACHINE, node=8))
    assert near.exposed_seconds == pytest.approx(0.128 + 216 / 1e3 + 4 * 1396 * 2 * 7 / 8 / 1e3 - busy * 2 / 3)


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


def saved_bytes(run: str, words: list[str]) -> tuple[int, int]:
    """Bytes that the real loop's first micro-batch saves for backward, parameters aside; and what was foretold."""
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    experts = config.model.moe.num_experts if config.model.moe else None
    trainer = Trainer(config, Path(run), build_mesh(config.parallel, "cpu", experts), lambda: False)
    trainer.setup.model.train()
    own = {weight.untyped_storage().data_ptr() for weight in trainer.setup.model.parameters()}
    kept: dict[int, torch.Tensor] = {}  # held, so that no address is used twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits_TV = trainer.setup.engine.forward(*trainer._inputs(0))
        trainer._loss(0, logits_TV)
    trainer.metrics.close()
    held = Footprint(config, config.layout(process.world()), cpu=True)
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()), held.casts + held.activations


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
    ],
    ids=" ".join,
)
def test_what_the_loop_keeps_for_backward_is_foretold(data, tmp_path, words):
    saved, foretold = saved_bytes(str(tmp_path), tiny(data, "train.seq_len=64", "moe.expert_width=96", *words))
    assert foretold == pytest.approx(saved, rel=0.15)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_without_drops_a_wider_model_is_foretold_closely(data, tmp_path, dtype):
    wide = ["model=small", "train.seq_len=256", "train.micro_batch=2", "moe=olmoe", f"train.dtype={dtype}"]
    saved, foretold = saved_bytes(str(tmp_path), tiny(data, *wide))
    assert foretold == pytest.approx(saved, rel=0.05)


def saved_and_sent(run: str, words: list[str]) -> tuple[int, int, int, float]:
    """`saved_bytes`, and the bytes that this rank gives to forward exchanges, those for itself included; foretold."""
    sent = []

    def start(flight, rows_ND, leg, what):
        sent.append(rows_ND.nbytes)
        return real(flight, rows_ND, leg, what)

    real, travel._Flight.start = travel._Flight.start, start
    try:
        saved, foretold = saved_bytes(run, words)
    finally:
        travel._Flight.start = real
    config = compose(words, world=process.world()).config
    found = forecast.Forecast(config, config.layout(process.world()), ACCELERATORS["cpu"], NETWORKS["eth10"])
    return saved, foretold, sum(sent), found.exchange_bytes * 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_ranks_keep_and_send_what_is_foretold(data, tmp_path, dtype):
    words = tiny(data, "train.seq_len=64", "moe=olmoe", "parallel.ep=2", f"train.dtype={dtype}")
    ranks = run_ranks(saved_and_sent, 2, str(tmp_path), words)
    saved, foretold, sent, exchanged = (sum(each) for each in zip(*ranks, strict=True))
    assert foretold == pytest.approx(saved, rel=0.05)
    assert exchanged == sent > 0


def test_formulas_that_are_written_twice_agree():
    assert footprint.EXPLICIT == attention.EXPLICIT
    for factor in (1.1, 1.25, 0.3):
        moe = replace(MOE, capacity_factor=factor, num_experts=3, min_capacity=2)
        config = replace(RUN, model=replace(MODEL, moe=moe, max_seq_len=100))
        for length in (3, 50, 100):
            one = Footprint(replace(config, train=replace(RUN.train, seq_len=length)), ONE)
            assert one.slots(moe) == capacity(length, 1, 3, factor, 2)


def test_the_verb_loads_no_torch_and_writes_what_it_shows(tmp_path):
    words = ["experiment=gshard_pydocs", "world=4", "train.global_batch=64", "accelerator=A100", "network=eth100"]
    code = (
        "import sys; from turnout.launch.main import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", f"{code}; sys.exit(code)", "plan", *words, f"json={tmp_path / 'plan.json'}"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert (plan["world"], plan["ep"], plan["edp"]) == (4, 2, 2)
    assert plan["memory"]["total"] == plan["bytes"] <= plan["worst_bytes"]
    assert {(row["world"], row["ep"]) for row in plan["layouts"]} == {
        (world, ep) for world in (1, 2, 4, 8, 16, 32, 64) for ep in (1, 2, 4, 8) if world % ep == 0
    }
    assert f"{plan['parameters']['total']:,} total" in result.stdout


def test_layouts_that_do_not_fit_are_marked(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("{bfloat16: 1e12, float32: 5e11, memory: 180e6, bandwidth: 1e11, link: 1e9, node: 4}")
    words = ["train.global_batch=4096", "train.micro_batch=4", f"accelerator={path}", f"json={tmp_path / 'plan.json'}"]
    assert main(["plan", "world=8", *words]) == 0
    rows = json.loads((tmp_path / "plan.json").read_text())["layouts"]
    assert {row["world"] for row in rows} == {2**i for i in range(11)}
    assert {row["fits"] for row in rows} == {True, False}
    assert all(row["fits"] == (row["bytes"] <= 180e6) for row in rows)
    shown = capsys.readouterr().out
    assert shown.count(" NO ") == sum(not row["fits"] for row in rows)
    assert "DOES NOT FIT" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["world=0"], "world (0) must be at least 1"),
        (["world=3"], "train.global_batch (8) must be a multiple of the 3 data-parallel ranks: use 6"),
        (["world=2", "world=4"], "world (4) is given twice"),
        (["world=1", "parallel.tp=2"], "parallel.tp (2) must fit the ranks"),
        (["world=2", "parallel.ep=4"], "parallel.ep (4) must divide the data-parallel ranks (2)"),
        (["accelerator=H300"], "accelerator (H300) is not a known accelerator and no file"),
        (["network=string"], "network (string) is not a known network and no file"),
        (["moe.num_expert=8"], "did you mean moe.num_experts?"),
        (["worl=8"], "did you mean world?"),
        (
            ["engine=deepspeed", "world=2", "optim=adamw", "optim.weight_decay=0", "train.dtype=float32"],
            "engine (deepspeed) is not planned",
        ),
        (["train.recompute=full"], "train.recompute (full) is not planned"),
        (["switch"], "has no '='"),
    ],
    ids=str,
)
def test_bad_settings_are_one_line_and_exit_code_2(words, message, capsys):
    assert main(["plan", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("memory: 1e9", "accelerator.bfloat16 is missing"),
        ("{memory: [", "can not be read as YAML"),
        ("memori: 1", "did you mean accelerator.memory?"),
        ("{bfloat16: 1, float32: 1, memory: 0, bandwidth: 1, link: 1}", "accelerator.memory (0.0) must be positive"),
    ],
    ids=str,
)
def test_a_bad_machine_file_names_its_field(tmp_path, text, message):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        accelerator(str(path))
    assert message in str(error.value)


def test_the_tables_hold_plausible_machines():
    for machine in ACCELERATORS.values():
        assert machine.bfloat16 > machine.float32 > machine.bandwidth > machine.link
    assert all(math.isfinite(net.bandwidth) for net in NETWORKS.values())
