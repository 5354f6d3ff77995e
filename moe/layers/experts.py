"""The stack of experts, run as one grouped GEMM, so an expert without tokens is an ordinary case.

N rows sorted by expert, T tokens, K choices, D width, F hidden width, E experts held here.
"""

import torch
from torch import Tensor, nn

from ...kernels import expert_rows, grouped_gemm, moe_mlp
from ...kernels.registry import invariant
from ..config import MoEConfig
from .ffn import ACTIVATIONS, hidden_rows


class Experts(nn.Module):
    """E feed-forward networks in two stacked tensors.

    Attributes:
        w_in: [E, 2F or F, D]; for SwiGLU the gate's rows come before the up projection's.
        w_out: [E, F, D].
        b_in: [E, 2F or F], b_out: [E, D]; None without biases.
        first: global id of the first expert held here; expert parallelism moves it.
    """

    def __init__(self, cfg: MoEConfig) -> None:
        super().__init__()
        self.cfg, self.first = cfg, 0
        rows = hidden_rows(cfg.activation, cfg.expert_width)
        self.w_in = nn.Parameter(torch.empty(cfg.num_experts, rows, cfg.width))
        self.w_out = nn.Parameter(torch.empty(cfg.num_experts, cfg.expert_width, cfg.width))
        self.b_in = nn.Parameter(torch.empty(cfg.num_experts, rows)) if cfg.bias else None
        self.b_out = nn.Parameter(torch.empty(cfg.num_experts, cfg.width)) if cfg.bias else None
        self.act = ACTIVATIONS[cfg.activation]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights afresh (truncated normal, σ = sqrt(init_scale / fan_in)); biases become zero."""
        for weight, fan_in in ((self.w_in, self.cfg.width), (self.w_out, self.cfg.expert_width)):
            std = (self.cfg.init_scale / fan_in) ** 0.5
            nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)
        for bias in (self.b_in, self.b_out):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x_ND: Tensor, ends_E: Tensor, dropped_NF: Tensor | None = None) -> Tensor:
        """Rows of expert e are x[ends[e-1] : ends[e]]; returns [N, D] in the same order.

        Hidden units where `dropped_NF` is True become zero, the others grow by 1 / (1 - expert_dropout).
        """
        if self.plain and dropped_NF is None and torch.is_grad_enabled() and not invariant():
            return expert_rows(x_ND, ends_E, self.w_in, self.w_out)
        owner_N = None if self.b_in is None else owners(ends_E, len(x_ND))
        h_NF = self.act(_plus(grouped_gemm(x_ND, self.w_in.transpose(1, 2), ends_E), self.b_in, owner_N))
        if dropped_NF is not None:
            h_NF = h_NF.masked_fill(dropped_NF, 0) / (1 - self.cfg.expert_dropout)
        return _plus(grouped_gemm(h_NF, self.w_out, ends_E), self.b_out, owner_N)

    @property
    def plain(self) -> bool:
        """Whether they are what `mix` computes: SwiGLU without biases."""
        return self.cfg.activation == "swiglu" and self.b_in is None

    def mix(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, kept_TK: Tensor) -> Tensor:
        """Σ_k weights[t, k] · expert ids[t, k] of x[t], of the choices that are kept; for all experts, in one go."""
        return moe_mlp(x_TD, ids_TK, weights_TK, kept_TK, self.w_in, self.w_out)


def owners(ends_E: Tensor, rows: int) -> Tensor:
    """int64 [N]: the expert of each row."""
    return torch.searchsorted(ends_E, torch.arange(rows, device=ends_E.device, dtype=ends_E.dtype), right=True)


def _plus(y_NM: Tensor, bias_EM: Tensor | None, owner_N: Tensor | None) -> Tensor:
    return y_NM if bias_EM is None else y_NM + bias_EM[owner_N].to(y_NM.dtype)
