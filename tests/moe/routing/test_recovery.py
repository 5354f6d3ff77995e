"""Every way to balance, on real text: all tokens start at the same k experts and are spread within 200 steps.

A byte-level decoder of one block on Python's documentation. Its embedding has a constant first component, because of
which every token's logits for the first k of 8 experts begin 2 above the others. Evenness is 0 when k experts take
everything and 1 when all take the same (`moe/train/alarm.py`). Coefficients are those of a short run: 0.1 instead of
0.01, and a bias that moves by 0.02 a step instead of 0.001.
"""

import functools

import pytest
import torch

from turnout.kernels import cross_entropy
from turnout.moe import Decoder, ModelConfig, MoEConfig, RouteContext, VarlenContext
from turnout.moe.data.corpus import read_documents
from turnout.moe.models.init import init_weights
from turnout.moe.routing.bias import update_biases
from turnout.moe.routing.stats import RoutingStats
from turnout.moe.train.alarm import CollapseAlarm, evenness

STEPS, ROWS, LENGTH, E, WIDTH, MARGIN = 200, 8, 64, 8, 32, 2.0
OFF = {f"{name}_loss": 0.0 for name in ("balance", "z", "sequence", "importance", "load")}

BALANCED = {
    "switch": {"router": "switch", "balance_loss": 0.1},
    "gshard": {"router": "gshard", "balance_loss": 0.1},
    "rows": {"router": "topk_softmax", "balance_loss": 0.1},
    "micro-batches": {"router": "topk_softmax", "balance_loss": 0.1, "balance_over": "micro_batch"},
    "the global batch": {"router": "topk_softmax", "global_batch_loss": 0.1},
    "sequences of DeepSeek-V3": {"router": "deepseek_v3", "top_k": 2, "bias_rate": 0.0, "sequence_loss": 0.1},
    "loss-free bias": {"router": "deepseek_v3", "top_k": 2, "bias_rate": 0.02},
    "groups of experts": {"router": "topk_softmax", "device_loss": 0.1, "device_groups": 4},
    "importance": {"router": "noisy_topk", "importance_loss": 0.1},
    "load": {"router": "noisy_topk", "load_loss": 0.1},
    "Sinkhorn": {"router": "sinkhorn"},
}
UNBALANCED = {
    "topk_softmax": {"router": "topk_softmax"},
    "deepseek_v3": {"router": "deepseek_v3", "top_k": 2, "bias_rate": 0.0},
}


@functools.cache
def text():
    joined = "\n".join(read_documents("pydocs", "train")[:20]).encode()
    return torch.frombuffer(bytearray(joined), dtype=torch.uint8).long()


def collapsed_model(settings):
    """A decoder whose router sends every token to the first k experts."""
    moe = MoEConfig(
        **{"width": WIDTH, "expert_width": 32, "num_experts": E, "every": 1, "init_scale": 1.0},
        **{"capacity_factor": None, **OFF, **settings},
    )
    sizes = {"width": WIDTH, "layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 16, "ffn_width": 32}
    model = Decoder(ModelConfig(vocab_size=256, max_seq_len=LENGTH, **sizes, moe=moe))
    init_weights(model, 0)
    router, seen = model.blocks[0].ffn.router, {}
    with torch.no_grad():
        model.embed.weight[:, 0] = 4.0
        hook = router.register_forward_pre_hook(lambda _, inputs: seen.update(x_TD=inputs[0]))
        forward(model, 0)
        hook.remove()
        router.weight.zero_()
        router.weight[: moe.top_k, 0] = MARGIN / seen["x_TD"][:, 0].mean()
    return model


def forward(model, step):
    """Summed loss and routing of one step's rows."""
    tokens = text()[step * ROWS * LENGTH :][: ROWS * LENGTH + 1]
    cu = torch.arange(0, ROWS * LENGTH + 1, LENGTH)
    ctx = VarlenContext(cu, route=RouteContext(cu_groups=cu, step=step, total_tokens=ROWS * LENGTH))
    logits = model(tokens[:-1], torch.arange(LENGTH).repeat(ROWS), ctx)
    return cross_entropy(logits, tokens[1:]).mean(), ctx.routings


@functools.cache
def trained(kind, name):
    """The rows that `steps` of training would log, one every 10."""
    model = collapsed_model((BALANCED if kind == "balanced" else UNBALANCED)[name])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.005, weight_decay=0)
    stats, rows = RoutingStats((0,), E, torch.device("cpu")), []
    for step in range(STEPS):
        loss, routings = forward(model.train(), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        update_biases(model, {layer: routing.counts_E for layer, routing in routings.items()})
        stats.add(routings)
        if step in (0, *range(9, STEPS, 10)):
            rows.append({"step": step + 1, **stats.fields()})
            stats.clear()
    return model.cfg.moe.top_k, rows


def evenness_of(row, top_k, groups=E):
    load_E = torch.tensor(row["expert_load"][0])
    return evenness(load_E.view(groups, -1).sum(1).tolist(), top_k if groups == E else 1)


@pytest.mark.parametrize("name", BALANCED)
def test_balancing_recovers_from_all_to_one_within_200_steps(name):
    top_k, rows = trained("balanced", name)
    if name != "Sinkhorn":  # which is balanced from the first step on, whatever the logits
        assert evenness_of(rows[0], top_k) < 0.25
    groups = BALANCED[name].get("device_groups", E)
    assert all(evenness_of(row, top_k, groups) > 0.5 for row in rows[-2:])


@pytest.mark.parametrize("name", UNBALANCED)
def test_without_balancing_experts_stay_dead_and_the_alarm_fires(name):
    top_k, rows = trained("unbalanced", name)
    alarm = CollapseAlarm(0.1, 3, top_k)
    fired = [event for row in rows for event in alarm.check(row)]
    assert next(event.step for event in fired) == 20  # the third row
    assert all(evenness_of(row, top_k) < 0.1 for row in rows[:10])
    assert all(row["dead_experts"][0] >= 4 for row in rows[:10])


def test_the_alarm_is_silent_once_a_run_has_recovered():
    top_k, rows = trained("balanced", "rows")
    alarm = CollapseAlarm(0.1, 3, top_k)
    assert not [event for row in rows[-5:] for event in alarm.check(row)]
