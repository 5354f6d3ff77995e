"""Metrics: windows that add up, files cut to the resumed step, a line, and a wandb that can never stop a run."""

import io
import json
import time
import warnings

import pytest
import torch

from turnout.moe.config import ModelConfig, MoEConfig
from turnout.moe.models.decoder import Decoder
from turnout.moe.routing.record import Routing
from turnout.moe.train.config import LogConfig
from turnout.moe.train.metrics import Metrics, Window, flops_per_token, peak_flops, progress_line

MOE = MoEConfig(width=8, expert_width=8, num_experts=2)
ROW = {
    "kind": "train", "step": 7, "loss": 3.21, "tokens_per_second": 5200.4, "expert_load": [[0.75, 0.25]],
    "drop_fraction": 0.021, "moe_layers": [1],
}  # fmt: skip


def routing(ids, kept, balance=1.0):
    ids_TK = torch.tensor(ids)[:, None]
    return Routing(
        ids_TK=ids_TK,
        weights_TK=torch.ones(len(ids), 1),
        kept_TK=torch.tensor(kept)[:, None],
        counts_E=torch.bincount(ids_TK.flatten(), minlength=2),
        probs_TE=torch.full((len(ids), 2), 0.5),
        logits_TE=torch.zeros(len(ids), 2),
        aux={"balance": torch.tensor(balance), "z": torch.tensor(0.25)},
    )


def test_a_window_is_the_mean_over_its_steps_tokens_and_layers():
    window = Window((1, 3), MOE, torch.device("cpu"))
    valid = torch.ones(4, dtype=torch.bool)
    window.add(torch.tensor(8.0), {1: routing([0, 0, 0, 1], [True] * 4), 3: routing([0] * 4, [True, False] * 2)}, valid)
    window.end_step(4)
    window.add(torch.tensor(4.0), {1: routing([1] * 4, [True] * 4), 3: routing([0] * 4, [True] * 4)}, valid)
    window.end_step(4)
    found = window.report(lambda total: total, 10.0, None)
    assert found["loss"] == 12 / 8
    assert found["expert_load"] == [[3 / 8, 5 / 8], [1.0, 0.0]]
    assert found["drop_fraction"] == pytest.approx((0 + 2 / 8) / 2)
    assert found["router_entropy"] == pytest.approx([torch.tensor(2.0).log().item()] * 2)
    assert (found["aux/balance"], found["z_loss"]) == (2.0, 0.5), "summed over layers, meant over steps"
    assert found["aux_loss"] == pytest.approx(0.01 * 2.0 + 0.001 * 0.5)
    assert found["mfu"] is None
    assert window.report(lambda total: total, 10.0, 1e3)["mfu"] > 0
    window.clear()
    assert window.report(lambda total: total, 10.0, None)["loss"] == 0.0


def test_a_pause_does_not_count_against_the_speed():
    window = Window((), None, torch.device("cpu"))
    window.end_step(100)
    with window.paused():
        time.sleep(0.2)
    assert window.report(lambda total: total, 1.0, None)["tokens_per_second"] > 100 / 0.1


def test_flops_count_the_weights_that_a_token_meets():
    moe = MoEConfig(width=16, expert_width=32, num_experts=4, top_k=2, router="gshard", every=1)
    cfg = ModelConfig(
        vocab_size=64, width=16, layers=1, heads=2, kv_heads=1, head_dim=8, ffn_width=32, max_seq_len=8, moe=moe
    )
    weights = dict(Decoder(cfg).named_parameters())
    active = sum(w.numel() * (2 / 4 if ".experts." in n else 1) for n, w in weights.items() if w.ndim > 1)
    assert flops_per_token(cfg, 8) == 6 * (active + 2 * 8 * 8)
    assert peak_flops(torch.device("cpu"), 8) is None


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


def test_a_dense_model_s_line_has_no_experts():
    assert progress_line({**ROW, "expert_load": []}, None) == "step      7  loss 3.2100  5,200 tok/s"


class Broken:
    """A wandb run whose service is gone."""

    id = "abc"

    def log(self, row, step):
        raise ConnectionError("no service")

    def finish(self):
        raise ConnectionError("no service")


def test_a_wandb_that_fails_is_left_out_and_the_file_stays_whole(tmp_path):
    metrics = Metrics(tmp_path, LogConfig(), {}, stream=io.StringIO())
    metrics.wandb = Broken()
    with pytest.warns(RuntimeWarning, match="wandb failed"):
        metrics.write(ROW)
    metrics.write(ROW)
    metrics.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    assert metrics.wandb_id is None


def test_wandb_without_a_key_works_offline_and_keeps_its_id(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    metrics = Metrics(tmp_path, LogConfig(wandb=True), {"seed": 1}, stream=io.StringIO())
    assert metrics.wandb_id
    metrics.write(ROW)
    metrics.write({"kind": "eval", "step": 7, "val_loss": 1.0, "bits_per_byte": 2.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        metrics.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
