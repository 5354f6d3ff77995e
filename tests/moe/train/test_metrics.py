"""Metrics: windows that add up, files cut to the resumed step, a line, and a wandb that can never stop a run."""

import dataclasses
import io
import json
import math
import socket
import sys
import time
import warnings

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from turnout import ConfigError
from turnout.moe.config import AttentionConfig, ModelConfig, MoEConfig
from turnout.moe.flops import flops_per_token
from turnout.moe.models.decoder import Decoder
from turnout.moe.routing.record import RouteContext, Routing
from turnout.moe.routing.registry import ROUTERS, build_router
from turnout.moe.routing.stats import RoutingStats
from turnout.moe.train.alarm import Event
from turnout.moe.train.config import LogConfig
from turnout.moe.train.metrics import Metrics, Window, peak_flops, progress_line
from turnout.moe.train.sinks import answers, flat
from turnout.parallel.dispatch.traffic import Traffic

CPU = torch.device("cpu")
MOE = MoEConfig(width=8, expert_width=8, num_experts=2)
ROW = {
    "kind": "train", "step": 7, "loss": 3.21, "tokens_per_second": 5200.4, "mfu": None, "expert_load": [[0.75, 0.25]],
    "drop_fraction": 0.021, "moe_layers": [1], "load_max_mean": [1.5], "dead_experts": [0],
}  # fmt: skip
FLAT = {
    "loss": 3.21, "tokens_per_second": 5200.4, "expert_load/layer1/expert0": 0.75, "expert_load/layer1/expert1": 0.25,
    "drop_fraction": 0.021, "load_max_mean/layer1": 1.5, "dead_experts/layer1": 0,
}  # fmt: skip
EVENT = Event(step=9, layer=1, evenness=0.05, expert_load=(0.99, 0.01))


def routing(ids, kept, balance=1.0, valid=None):
    ids_TK = torch.tensor(ids)[:, None]
    wanted_TK = torch.ones_like(ids_TK, dtype=torch.bool) if valid is None else valid[:, None]
    return Routing(
        ids_TK=ids_TK,
        weights_TK=torch.ones(len(ids), 1),
        wanted_TK=wanted_TK,
        kept_TK=torch.tensor(kept)[:, None],
        shares_TE=torch.full((len(ids), 2), 0.5),
        logits_TE=torch.zeros(len(ids), 2),
        aux={"balance": torch.tensor(balance), "z": torch.tensor(0.25)},
    )


def alone(total):
    return total


def test_a_window_is_the_mean_over_its_steps_tokens_and_layers():
    window = Window((1, 3), MOE, CPU)
    valid = torch.ones(4, dtype=torch.bool)
    window.add_loss(torch.tensor(8.0))
    window.add({1: routing([0, 0, 0, 1], [True] * 4), 3: routing([0] * 4, [True, False] * 2)}, valid)
    window.end_step(4)
    window.add_loss(torch.tensor(4.0))
    window.add({1: routing([1] * 4, [True] * 4), 3: routing([0] * 4, [True] * 4)}, valid)
    window.end_step(4)
    found = window.report(alone, 10.0, None)
    assert found["loss"] == 12 / 8
    assert found["expert_load"] == [[3 / 8, 5 / 8], [1.0, 0.0]]
    assert found["drop_fraction"] == pytest.approx((0 + 2 / 8) / 2)
    assert found["dead_experts"] == [0, 1]
    assert found["router_entropy"] == pytest.approx([math.log(2)] * 2)
    assert (found["aux/balance"], found["z_loss"]) == (2.0, 0.5), "summed over layers, meant over steps"
    assert found["aux/z"] == found["z_loss"]
    assert found["aux_loss"] == pytest.approx(0.01 * 2.0 + 0.001 * 0.5)
    assert found["mfu"] is None
    assert window.report(alone, 10.0, 1e3)["mfu"] > 0
    window.clear()
    assert window.report(alone, 10.0, None)["loss"] == 0.0


def test_a_row_says_of_routing_what_the_one_measure_says():
    window, stats, valid = Window((1,), MOE, CPU), RoutingStats((1,), 2, CPU), torch.tensor([True, True, True, False])
    for routed in (routing([0, 1, 1, 0], [True] * 4, valid=valid), routing([0] * 4, [False] * 4, valid=valid)):
        window.add_loss(torch.tensor(1.0))
        window.add({1: routed}, valid)
        stats.add({1: routed}, valid)
    window.end_step(6)
    row = window.report(alone, 1.0, None)
    assert {name: row[name] for name in stats.fields()} == stats.fields()
    assert row["expert_load"] == [pytest.approx([4 / 6, 2 / 6])]


LOSSES = {
    "noisy_topk": {"balance_loss": 0.01, "z_loss": 0.002, "global_batch_loss": 0.5},
    "deepseek_v3": {"sequence_loss": 0.1},
    "switch": {"device_loss": 0.3, "device_groups": 2, "importance_loss": 0.4},
    "hash": {},
}


@pytest.mark.parametrize("name", LOSSES)
def test_every_configured_loss_has_its_field(name):
    torch.manual_seed(0)
    moe = MoEConfig(width=8, expert_width=8, num_experts=4, router=name, **LOSSES[name])
    context = RouteContext(valid_T=torch.ones(16, dtype=torch.bool), token_ids_T=torch.arange(16))
    routed = build_router(moe, layer=1).train()(torch.randn(16, 8), context)
    window = Window((1,), moe, CPU)
    window.add_loss(torch.tensor(1.0))
    window.add({1: routed}, context.valid_T)
    window.end_step(16)
    row = window.report(alone, 1.0, None)
    found = {key.removeprefix("aux/"): value for key, value in row.items() if key.startswith("aux/")}
    assert found == pytest.approx({loss: float(routed.aux[loss].detach()) for loss in moe.losses})
    assert found.keys() >= {loss.removesuffix("_loss") for loss in LOSSES[name] if loss != "device_groups"}
    assert row["aux_loss"] == pytest.approx(sum(moe.losses[loss] * value for loss, value in found.items()))
    assert row["z_loss"] == found.get("z", 0.0)


def test_a_dense_model_has_no_losses_of_routers():
    row = Window((), None, CPU).report(alone, 1.0, None)
    assert (row["aux_loss"], row["z_loss"], row["moe_layers"], row["expert_load"]) == (0.0, 0.0, [], [])


def test_a_pause_does_not_count_against_the_speed():
    window = Window((), None, torch.device("cpu"))
    window.end_step(100)
    with window.paused():
        time.sleep(0.2)
    assert window.report(lambda total: total, 1.0, None)["tokens_per_second"] > 100 / 0.1


class Counted(Traffic):
    """Two exchanges, of which a second was waited for and which took four."""

    def seconds(self):
        return 1.0, 4.0


def test_traffic_is_a_rank_s_mean_of_a_step():
    window = Window((), None, CPU, traffic=Counted())
    window.traffic.bytes = 600
    window.since -= 10
    window.end_step(1)
    window.end_step(1)
    row = window.report(lambda mine: 3 * mine, 1.0, None)  # three ranks like this one
    assert (row["all_to_all_bytes"], row["all_to_all_seconds"], row["all_to_all_under_way"]) == (300.0, 0.5, 2.0)
    assert row["all_to_all_share"] == pytest.approx(0.1, rel=0.01)
    one_of_two = window.report(lambda mine: mine, 1.0, None)
    assert one_of_two["all_to_all_bytes"] == 300.0, "a rank without experts to spread is no part of the mean"
    window.clear()
    assert window.traffic.bytes == 0
    assert not any(name.startswith("all_to_all") for name in Window((), None, CPU).report(alone, 1.0, None))


def test_what_is_exchanged_in_a_pause_does_not_count():
    window = Window((), None, CPU, traffic=Traffic())
    assert window.traffic.counting
    with window.paused():
        assert not window.traffic.counting
    assert window.traffic.counting


SHARED = {"shared_experts": 2, "shared_width": 24, "shared_gate": True}


@pytest.mark.parametrize("changes", [{}, SHARED, {"shared_experts": 2}], ids=["plain", "gated", "shared"])
@pytest.mark.parametrize("router", ROUTERS)
def test_flops_count_the_weights_that_a_token_meets(router, changes):
    moe = MoEConfig(width=16, expert_width=32, num_experts=4, router=router, every=1, noncausal=True, **changes)
    cfg = ModelConfig(
        vocab_size=64, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_width=32, max_seq_len=8, moe=moe
    )
    weights = dict(Decoder(cfg).named_parameters())
    met = {"dense": 4 / 4, "expert_choice": 2 * 1.25 / 4}.get(router, moe.top_k / 4)
    active = sum(w.numel() * (met if ".experts." in n else 1) for n, w in weights.items() if w.ndim > 1)
    assert flops_per_token(cfg, 8) == 6 * (active + 2 * 8 * 8)
    assert peak_flops(torch.device("cpu"), 8) is None


@pytest.mark.parametrize("activation", ["swiglu", "relu", "swiglu_clamped"])
def test_flops_of_windows_biases_and_activations(activation):
    own = AttentionConfig(window=4, window_layers=(1,), qkv_bias=True, output_bias=True, sinks=True, qk_norm="head")
    cfg = ModelConfig(
        vocab_size=64, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_width=32, max_seq_len=512,
        attention=own, activation=activation,
    )  # fmt: skip
    matrices = sum(w.numel() for w in Decoder(cfg).parameters() if w.ndim > 1)
    seen = [sum(min(i + 1, size) for i in range(512)) / 512 for size in (512, 4)]  # of layer 0 and of layer 1
    exact = 6 * (matrices + 2 * 16 * sum(seen))
    assert flops_per_token(cfg, 512) == pytest.approx(exact, rel=2e-3)
    assert flops_per_token(cfg, 3) == flops_per_token(dataclasses.replace(cfg, attention=AttentionConfig()), 3)


def test_rows_beyond_the_resumed_step_and_a_torn_line_are_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"kind": "train", "step": s}) + "\n" for s in (1, 2, 3)) + '{"kind": "tr')
    stream = io.StringIO()
    metrics = Metrics(tmp_path, LogConfig(), {}, step=2, stream=stream)
    metrics.write(ROW, 62)
    metrics.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 7]
    assert stream.getvalue() == "step      7  loss 3.2100  5,200 tok/s  drop 2.1%  load max/mean 1.50  eta 1:02\n"


def test_other_ranks_write_nowhere(tmp_path):
    metrics = Metrics(tmp_path, LogConfig(wandb=True), {}, writes=False)
    metrics.write(ROW)
    metrics.close()
    assert not list(tmp_path.iterdir())


def test_an_alarm_is_a_row_and_a_line_and_is_cut_off_like_any_row(tmp_path):
    stream = io.StringIO()
    metrics = Metrics(tmp_path, LogConfig(), {}, stream=stream)
    metrics.write(ROW)
    metrics.alarm(EVENT)
    metrics.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows[1] == {"kind": "alarm", "step": 9, "layer": 1, "evenness": 0.05, "expert_load": [0.99, 0.01]}
    line = stream.getvalue().splitlines()[1]
    assert line.startswith("step      9  ALARM: layer 1 has collapsed: expert 0 of 2 takes 99.0% of the assignments")
    Metrics(tmp_path, LogConfig(), {}, step=8, stream=stream).close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_a_dense_model_s_line_has_no_experts():
    assert progress_line({**ROW, "moe_layers": []}, None) == "step      7  loss 3.2100  5,200 tok/s"


def test_the_line_tells_of_dead_experts():
    row = {**ROW, "moe_layers": [1, 3], "load_max_mean": [1.5, 2.0], "dead_experts": [1, 2]}
    assert progress_line(row, None).endswith("drop 2.1%  load max/mean 2.00  dead 3")


def test_lists_get_a_name_for_each_layer_and_expert():
    assert flat(ROW) == FLAT


class Broken:
    """A wandb run whose service is gone."""

    id = "abc"

    def fail(self, *_args):
        raise ConnectionError("no service")

    log = alarm = close = fail


@pytest.mark.parametrize("call", ["write", "alarm", "close"])
def test_a_wandb_that_fails_is_left_out_and_the_file_stays_whole(tmp_path, call):
    metrics = Metrics(tmp_path, LogConfig(), {}, stream=io.StringIO())
    metrics.sinks.working["wandb"] = Broken()
    assert metrics.wandb_id == "abc"
    with pytest.warns(RuntimeWarning, match="wandb failed"):
        getattr(metrics, call)(*{"write": (ROW,), "alarm": (EVENT,)}.get(call, ()))
    assert metrics.wandb_id is None
    if call != "close":
        metrics.write(ROW)
        metrics.close()
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.fixture
def no_key(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


@pytest.mark.usefixtures("no_key")
def test_wandb_without_a_key_works_offline_and_keeps_its_id(tmp_path):
    metrics = Metrics(tmp_path, LogConfig(wandb=True), {"seed": 1}, stream=io.StringIO())
    assert metrics.wandb_id
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        metrics.write(ROW)
        metrics.write({"kind": "eval", "step": 8, "split": "validation", "val_loss": 1.0, "bits_per_byte": 2.0})
        metrics.alarm(EVENT)
        assert metrics.sinks.working["wandb"].run.summary["load_max_mean/layer1"] == 1.5
        metrics.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def events(run):
    found = EventAccumulator(str(run / "tensorboard"))
    found.Reload()
    return found


def test_tensorboard_holds_the_same_names_and_numbers(tmp_path):
    metrics = Metrics(tmp_path, LogConfig(tensorboard=True), {}, stream=io.StringIO())
    metrics.write(ROW)
    metrics.write({"kind": "eval", "step": 7, "split": "tuning", "val_loss": 1.5, "bits_per_byte": 2.0})
    metrics.alarm(EVENT)
    metrics.close()
    found = events(tmp_path)
    expected = {**FLAT, "val_loss": 1.5, "bits_per_byte": 2.0}
    assert set(found.Tags()["scalars"]) == set(expected)
    for name, value in expected.items():
        (read,) = found.Scalars(name)
        assert (read.step, read.value) == (7, pytest.approx(value, rel=1e-6))
    (told,) = found.Tensors("alarm/layer1/text_summary")
    assert (told.step, told.tensor_proto.string_val[0].decode()) == (9, EVENT.text)


def test_tensorboard_of_a_resumed_run_forgets_the_lost_future(tmp_path):
    for resumed, steps in ((0, (5, 10, 15)), (10, (15, 20))):
        metrics = Metrics(tmp_path, LogConfig(tensorboard=True), {}, step=resumed, stream=io.StringIO())
        for step in steps:
            metrics.write({**ROW, "step": step, "loss": float(resumed)})
        metrics.close()
    assert [(event.step, event.value) for event in events(tmp_path).Scalars("loss")] == [
        (5, 0.0), (10, 0.0), (15, 10.0), (20, 10.0)
    ]  # fmt: skip


@pytest.mark.parametrize(("name", "package"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_a_warning(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.warns(RuntimeWarning, match=f"{name} does not work and is left out"):
        metrics = Metrics(tmp_path, LogConfig(**{name: True}), {}, stream=io.StringIO())
    metrics.write(ROW)
    metrics.close()
    assert (tmp_path / "metrics.jsonl").exists()


@pytest.mark.parametrize("alarm", [0.0, 1.0, -1.0, float("nan")])
def test_an_alarm_outside_0_to_1_is_refused(alarm):
    with pytest.raises(ConfigError, match=r"log\.alarm .* must lie between 0 and 1"):
        LogConfig(alarm=alarm)


def test_a_server_or_its_proxy_answers_or_does_not(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert answers(f"http://127.0.0.1:{port}/api")
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
        assert answers("http://wandb.invalid"), "the proxy is asked, not the server"
    assert not answers("http://wandb.invalid"), "the proxy is dead"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    assert not answers(f"http://127.0.0.1:{port}")
