"""DeepSeek-V2 and V3, with V2-Lite, Moonlight and what else has their form: latent attention, group-limited experts.

    V2    softmax scores, `topk_method` greedy or group_limited_greedy
    V3    sigmoid scores and a bias that balances the load; tensors of multi-token prediction are left out

Queries and keys turn in neighbouring pairs on disk, in halves here. Under YaRN `mscale_all_dim` raises the scale of
all scores and `mscale` the rotary ones beside it: softmax(q · k · m(all)² / sqrt(d)), q and k turned by m(mscale) /
m(all), with m(s) = 0.1 · s · ln(factor) + 1.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from ... import ConfigError
from ..config import AttentionConfig, LatentConfig, ModelConfig, MoEConfig
from ..layers.rotary import yarn_magnitude
from . import common
from .family import FREQUENCIES, Family
from .keys import Keys
from .place import Place, paired, rows, transposed

NORM_EPS = 1e-6  # of the latents' norms: not in config.json
SPARSE = (  # what a dense model does not need
    "aux_loss_alpha", "moe_intermediate_size", "moe_layer_freq", "n_group", "n_routed_experts", "n_shared_experts",
    "norm_topk_prob", "num_experts_per_tok", "routed_scaling_factor", "scoring_func", "topk_group", "topk_method",
)  # fmt: skip


def read(keys: Keys, v3: bool) -> ModelConfig:
    sizes, rope_dim = common.read_sizes(keys), keys.get("qk_rope_head_dim")
    keys.only("num_key_value_heads", (sizes["heads"],), sizes["heads"])
    keys.only("num_nextn_predict_layers", (0, 1), 0)
    keys.only("mlp_bias", (False,), False)
    for name in ("ep_size", "qk_head_dim", "rope_interleave", "seq_aux"):  # a place, a sum, `variant`'s, training
        keys.maybe(name)
    latent = LatentConfig(
        rank=keys.get("kv_lora_rank"), rope_dim=rope_dim, value_dim=keys.get("v_head_dim"),
        query_rank=keys.maybe("q_lora_rank"), eps=NORM_EPS,
    )  # fmt: skip
    bias, head_dim = keys.get("attention_bias", False), keys.get("qk_nope_head_dim")
    rope, scale = sizes.get("rope"), None
    stretch = {**(keys.maybe("rope_scaling") or {}), **(keys.maybe("rope_parameters") or {})}
    if rope is not None and stretch.get("mscale_all_dim"):
        everywhere = yarn_magnitude(rope.factor, stretch["mscale_all_dim"])
        scale = everywhere**2 * (head_dim + rope_dim) ** -0.5
        if rope.kind == "yarn" and stretch.get("mscale") and rope.magnitude is None:
            sizes["rope"] = replace(rope, magnitude=yarn_magnitude(rope.factor, stretch["mscale"]) / everywhere)
    attention = AttentionConfig(latent=latent, qkv_bias=bias, output_bias=bias, scale=scale)
    sizes |= {"head_dim": head_dim, "attention": attention, "moe": _read_moe(keys, sizes, v3)}
    return ModelConfig(**sizes)


def _read_moe(keys: Keys, sizes: Mapping[str, Any], v3: bool) -> MoEConfig | None:
    first = keys.get("first_k_dense_replace", 0)
    if first >= sizes["layers"]:
        for name in SPARSE:
            keys.maybe(name)
        return None
    keys.only("moe_layer_freq", (1,), 1)
    keys.only("scoring_func", ("sigmoid",) if v3 else ("softmax",), "sigmoid" if v3 else "softmax")
    methods = ("noaux_tc",) if v3 else ("greedy", "group_limited_greedy")
    limited = keys.only("topk_method", methods, methods[0]) != "greedy"
    groups, top_groups = (keys.get(name, 1) for name in ("n_group", "topk_group"))
    balance = float(keys.get("aux_loss_alpha", 1e-4 if v3 else 1e-3))
    if v3:
        own = {"router": "deepseek_v3", "sequence_loss": balance, "renormalize": keys.get("norm_topk_prob", True)}
    else:
        own = {"router": "deepseek_v2", "balance_loss": balance, "z_loss": 0.0}
        keys.only("norm_topk_prob", (False,), False)  # DeepSeek's code and Hugging Face's disagree on the other
    return MoEConfig(
        width=sizes["width"],
        expert_width=keys.get("moe_intermediate_size"),
        num_experts=keys.get("n_routed_experts"),
        top_k=keys.get("num_experts_per_tok"),
        expert_groups=groups if limited else 1,
        top_groups=top_groups if limited else 1,
        route_scale=float(keys.get("routed_scaling_factor", 1.0)),
        shared_experts=keys.get("n_shared_experts"),
        every=1,
        first_dense=first,
        capacity_factor=None,
        eval_capacity_factor=None,
        **own,
    )


def write(cfg: ModelConfig, v3: bool) -> dict[str, Any]:
    latent = cfg.attention.latent
    if latent is None:
        raise ConfigError("model.attention.latent (null) must be set for DeepSeek: choose llama or mixtral")
    return {
        **common.write_sizes(cfg), "rope_parameters": _write_stretch(cfg, latent), "head_dim": latent.rope_dim,
        "attention_bias": cfg.attention.qkv_bias, "q_lora_rank": latent.query_rank, "kv_lora_rank": latent.rank,
        "qk_nope_head_dim": cfg.head_dim, "qk_rope_head_dim": latent.rope_dim, "v_head_dim": latent.value_dim,
        **({"rope_interleave": True} if v3 else {"mlp_bias": False}),
        **({"first_k_dense_replace": cfg.layers} if cfg.moe is None else _write_moe(cfg, cfg.moe, v3)),
    }  # fmt: skip


def _write_stretch(cfg: ModelConfig, latent: LatentConfig) -> dict[str, Any]:
    """`rope_parameters`, with the scale of the scores as `mscale_all_dim`."""
    given: dict[str, Any] = common.write_rope(cfg)["rope_parameters"]
    scale, plain = cfg.attention.scale, (cfg.head_dim + latent.rope_dim) ** -0.5
    if scale is None or cfg.rope is None or cfg.rope.factor == 1:
        return given
    everywhere = ((scale / plain) ** 0.5 - 1) / (0.1 * math.log(cfg.rope.factor))
    return given | {"mscale_all_dim": round(everywhere, 10)}  # 0.707 stays 0.707


def _write_moe(cfg: ModelConfig, moe: MoEConfig, v3: bool) -> dict[str, Any]:
    return {
        "moe_intermediate_size": moe.expert_width, "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k, "n_shared_experts": moe.shared_experts,
        "first_k_dense_replace": cfg.moe_layers[0], "n_group": moe.expert_groups, "topk_group": moe.top_groups,
        "routed_scaling_factor": moe.route_scale, "norm_topk_prob": moe.renormalize,
        "aux_loss_alpha": moe.sequence_loss if v3 else moe.balance_loss,
        "scoring_func": "sigmoid" if v3 else "softmax",
        "topk_method": "noaux_tc" if v3 else "group_limited_greedy" if moe.expert_groups > 1 else "greedy",
    }  # fmt: skip


def places(cfg: ModelConfig, interleaved: bool = True) -> Iterator[Place]:
    yield from common.ends(cfg)
    for layer in range(cfg.layers):
        yield from common.norms(layer)
        yield from _attention(cfg, f"{common.LAYER}.{layer}.self_attn", f"blocks.{layer}.attention", interleaved)
        theirs, ours = f"{common.LAYER}.{layer}.mlp", f"blocks.{layer}.ffn"
        if cfg.moe is None or layer not in cfg.moe_layers:
            yield from common.gated(theirs, ours, cfg.ffn_width)
            continue
        yield Place(f"{theirs}.gate.weight", f"{ours}.router.weight")
        if cfg.moe.router == "deepseek_v3":
            yield Place(f"{theirs}.gate.e_score_correction_bias", f"{ours}.router.balance_bias", wide=True)
        yield from common.experts(f"{theirs}.experts", ours, cfg)
        yield from _shared(f"{theirs}.shared_experts", ours, cfg.moe)


def _attention(cfg: ModelConfig, theirs: str, ours: str, interleaved: bool) -> Iterator[Place]:
    own, latent = cfg.attention, cfg.attention.latent
    assert latent is not None
    turn = latent.rope_dim
    q, kv = (
        (paired(cfg.heads, cfg.head_dim + turn, turn), paired(1, latent.rank + turn, turn))
        if interleaved
        else (None, None)
    )
    named: list[tuple[str, str, tuple[int, ...] | None, bool]] = [
        ("kv_a_proj_with_mqa", "wkv_down", kv, own.qkv_bias),
        ("kv_a_layernorm", "kv_norm", None, False),
        ("kv_b_proj", "wkv", None, False),
        ("o_proj", "wo", None, own.output_bias),
    ]
    if latent.query_rank is None:
        named += [("q_proj", "wq", q, False)]
    else:
        named += [("q_a_proj", "wq_down", None, own.qkv_bias), ("q_a_layernorm", "q_norm", None, False)]
        named += [("q_b_proj", "wq", q, False)]
    for one, other, order, bias in named:
        for leaf in ("weight", "bias") if bias else ("weight",):
            yield Place(f"{theirs}.{one}.{leaf}", f"{ours}.{other}.{leaf}", order=order)


def _shared(theirs: str, ours: str, moe: MoEConfig) -> Iterator[Place]:
    if moe.shared_experts:
        yield from common.gated(theirs, f"{ours}.shared", moe.shared_experts * moe.expert_width)
        return
    for name in ("gate_proj", "up_proj"):  # Hugging Face writes matrices without elements
        yield Place(f"{theirs}.{name}.weight", f"{ours}.router.weight", rows(0, 0))
    yield Place(f"{theirs}.down_proj.weight", f"{ours}.router.weight", lambda weight: transposed(weight[:0]))


DEEPSEEK_V2 = Family(
    name="deepseek_v2", architecture="DeepseekV2ForCausalLM", read=partial(read, v3=False),
    write=partial(write, v3=False), places=places,
)  # fmt: skip


def _as_written(data: Mapping[str, Any]) -> Family:
    """`rope_interleave` says how queries and keys lie on disk."""
    interleaved = data.get("rope_interleave") is not False
    return DEEPSEEK_V3 if interleaved else replace(DEEPSEEK_V3, places=partial(places, interleaved=False))


DEEPSEEK_V3 = Family(
    name="deepseek_v3", architecture="DeepseekV3ForCausalLM", read=partial(read, v3=True),
    write=partial(write, v3=True), places=places, variant=_as_written,
    ignored=(FREQUENCIES, f"{common.LAYER}.{{layers}}.*"),
)  # fmt: skip
