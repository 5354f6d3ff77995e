"""Small decoders with dense and sparse blocks, whose every number is random, and calibration rows for them.

model = make_model({"router": "gshard"}, layers=2)
"""

from typing import Any

import torch

from turnout.moe import Decoder, ModelConfig, MoEConfig, VarlenContext
from turnout.moe.models.init import init_weights
from turnout.moe.routing.record import RouteContext

VOCABULARY = 50


def make_config(moe: dict[str, Any] | None, **changes: Any) -> ModelConfig:
    """Four blocks of width 24; `moe` = None is dense, {} every other block of four experts."""
    settings = {
        "vocab_size": VOCABULARY, "width": 24, "layers": 4, "heads": 4, "kv_heads": 2, "head_dim": 6,
        "ffn_width": 32, "max_seq_len": 64, "eos_token_id": 0,
    }  # fmt: skip
    sparse = {"width": 24, "expert_width": 16, "num_experts": 4, "init_scale": 2.0}
    return ModelConfig(**settings | changes, moe=None if moe is None else MoEConfig(**sparse | moe))


def make_model(moe: dict[str, Any] | None, seed: int = 0, **changes: Any) -> Decoder:
    """Such a model in evaluation mode; what starts at zero is drawn too."""
    model = Decoder(make_config(moe, **changes))
    init_weights(model, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if not tensor.any():
                torch.nn.init.normal_(tensor, std=0.1)
    return model.eval().requires_grad_(False)


def logits(model: Decoder, tokens: int = 48, seed: int = 0) -> torch.Tensor:
    """Of one sequence of random tokens, nothing dropped."""
    ids_T = torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(seed))
    route = RouteContext(token_ids_T=ids_T, dropless=True)
    return model(ids_T, torch.arange(tokens), VarlenContext(torch.tensor([0, tokens]), route=route))
