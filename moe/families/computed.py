"""What of a configuration decides the logits of a trained model, so that two that compute the same compare equal."""

from typing import Any

from ...configs.typed import to_dict
from ..config import COEFFICIENTS, ModelConfig, MoEConfig

# Of training alone, or said by `sparse_blocks` and `shared` below.
UNSAID = frozenset({
    *COEFFICIENTS, "balance_over", "device_groups", "bias_rate", "capacity_factor", "drop_order", "reroute", "jitter",
    "expert_dropout", "noncausal", "init_scale", "every", "first_dense", "sparse_layers",
    "shared_experts", "shared_width",
})  # fmt: skip
DROPPING = ("capacity_tokens", "min_capacity", "group")  # mean nothing where nothing is dropped
# Another name for the k largest of a softmax as they are, which `moe.renormalize` tells from Mixtral's.
PLAIN_SOFTMAX = ("switch", "softmax")


def computed(cfg: ModelConfig) -> dict[str, Any]:
    """Dotted name → value."""
    found = _flat("model", to_dict(cfg))
    moe = cfg.moe
    if moe is not None:
        found |= {f"moe.{name}": value for name, value in _moe(cfg, moe).items()}
    encoder_layers = cfg.encoder.layers if cfg.encoder else 0
    if moe is not None and len(cfg.moe_layers) == cfg.layers + encoder_layers:
        found = {name: value for name, value in found.items() if name not in ("model.ffn_width", "model.activation")}
    found["model.attention.window"] = tuple(cfg.attention.window_of(layer) for layer in range(cfg.layers))
    found.pop("model.attention.window_layers", None)
    return {name: value for name, value in found.items() if not name.startswith("model.moe")}


def _moe(cfg: ModelConfig, moe: MoEConfig) -> dict[str, Any]:
    found = {name: value for name, value in to_dict(moe).items() if name not in UNSAID}
    if moe.eval_capacity_factor is None:
        found = {name: value for name, value in found.items() if name not in DROPPING}
    if moe.router in PLAIN_SOFTMAX:
        found |= {"router": "topk_softmax", "renormalize": False}
    found["sparse_blocks"] = cfg.moe_layers
    found["shared"] = moe.shared_width or moe.shared_experts * moe.expert_width
    return found


def _flat(prefix: str, values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _flat(f"{prefix}.{name}", value) if isinstance(value, dict) else {f"{prefix}.{name}": value}
    return found
