"""Pure functions on tensors: every operation has a plain PyTorch reference and, where it pays, faster forms.

`from turnout.kernels import grouped_gemm`. `registry.py` picks the form; `with using("reference"):` forces one.
Nothing here knows of a model or of other processes. Names are resolved on first use, so importing this is free.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ops import (
        adamw_step,
        add_rms_norm,
        combine,
        cross_entropy,
        expert_rows,
        grouped_gemm,
        head_gemm,
        heads,
        linear,
        linear_cross_entropy,
        moe_mlp,
        permute,
        pointwise,
        quantized_linear,
        quantized_moe_mlp,
        rms_norm,
        rope,
        rotate,
        sample_rows,
        sort_by_expert,
        square_sum,
        swiglu,
        top_k_gates,
    )
    from .paging import copy_blocks, paged_attention, store_kv, varlen_attention
    from .quantized import QuantizedWeight, quantize_weight
    from .random import normal, uniform
    from .registry import table, using
    from .routes import store_routes, tally_routes

_ELSEWHERE = {
    "QuantizedWeight": ".quantized",
    "copy_blocks": ".paging",
    "normal": ".random",
    "paged_attention": ".paging",
    "quantize_weight": ".quantized",
    "store_kv": ".paging",
    "store_routes": ".routes",
    "table": ".registry",
    "tally_routes": ".routes",
    "uniform": ".random",
    "using": ".registry",
    "varlen_attention": ".paging",
}

__all__ = [
    "QuantizedWeight",
    "adamw_step",
    "add_rms_norm",
    "combine",
    "copy_blocks",
    "cross_entropy",
    "expert_rows",
    "grouped_gemm",
    "head_gemm",
    "heads",
    "linear",
    "linear_cross_entropy",
    "moe_mlp",
    "normal",
    "paged_attention",
    "permute",
    "pointwise",
    "quantize_weight",
    "quantized_linear",
    "quantized_moe_mlp",
    "rms_norm",
    "rope",
    "rotate",
    "sample_rows",
    "sort_by_expert",
    "square_sum",
    "store_kv",
    "store_routes",
    "swiglu",
    "table",
    "tally_routes",
    "top_k_gates",
    "uniform",
    "using",
    "varlen_attention",
]


def __getattr__(name: str) -> object:
    if name in __all__:
        return getattr(importlib.import_module(_ELSEWHERE.get(name, ".ops"), __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
