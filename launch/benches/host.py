"""A plain decoder with somebody else's mixture of experts in it, one training step at a time.

Runs as a program of its own, with the Python of the environment in which that library lives: sizes (JSON) and the kind
in argv, `step` or `peak` a line on stdin, an answer a line on stdout. bfloat16 autocast, fused AdamW, random tokens.
"""

import json
import resource
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class SwiGLU(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Dense(nn.Module):
    """As many weights for a token as its experts have."""

    def __init__(self, s: SimpleNamespace) -> None:
        super().__init__()
        self.inner = SwiGLU(s.width, s.hidden * s.top_k)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.inner(x), 0.0


class Loop(nn.Module):
    """A loop over the experts, dropless."""

    def __init__(self, s: SimpleNamespace) -> None:
        super().__init__()
        self.top_k = s.top_k
        self.router = nn.Linear(s.width, s.experts, bias=False)
        self.experts = nn.ModuleList(SwiGLU(s.width, s.hidden) for _ in range(s.experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        rows = x.flatten(0, 1)
        weights, ids = self.router(rows).float().softmax(-1).topk(self.top_k, -1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            at, choice = (ids == number).nonzero(as_tuple=True)
            out.index_add_(0, at, (expert(rows[at]) * weights[at, choice, None]).to(out.dtype))
        return out.view_as(x), 0.0


class Adapted(nn.Module):
    """A library's layer; `take` gives its output and its loss."""

    def __init__(self, inner: nn.Module, take: Callable[[Any], tuple[Tensor, Any]]) -> None:
        super().__init__()
        self.inner, self.take = inner, take

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        return self.take(self.inner(x))


def torchtitan(s: SimpleNamespace) -> nn.Module:
    from torchtitan.models.common.linear import Linear
    from torchtitan.models.common.moe import GroupedExperts, MoE, RoutedExperts, TokenChoiceTopKRouter
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher

    router = TokenChoiceTopKRouter.Config(
        num_experts=s.experts, gate=Linear.Config(in_features=s.width, out_features=s.experts, bias=False),
        top_k=s.top_k, score_func="softmax", route_norm=True,
    )  # fmt: skip
    experts = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=s.width, hidden_dim=s.hidden, num_experts=s.experts),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=s.experts, top_k=s.top_k),
    )
    made = MoE.Config(
        num_experts=s.experts, load_balance_coeff=1e-3, shared_experts=None, router=router, routed_experts=experts
    ).build()
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.02)
    return Adapted(made, lambda y: (y, 0.0))


def st_moe(s: SimpleNamespace) -> nn.Module:
    from st_moe_pytorch import MoE

    made = MoE(
        dim=s.width, num_experts=s.experts, expert_hidden_mult=1.5 * s.hidden / s.width, gating_top_n=s.top_k,
        capacity_factor_train=1.25,
    )  # fmt: skip
    return Adapted(made, lambda found: (found.outputs, found.total_aux_loss))


def mixture_of_experts(s: SimpleNamespace) -> nn.Module:
    from mixture_of_experts import MoE

    return Adapted(MoE(dim=s.width, num_experts=s.experts, hidden_dim=s.hidden * 3 // 2), lambda found: found)


LAYERS: dict[str, Callable[[SimpleNamespace], nn.Module]] = {
    "dense": Dense,
    "loop": Loop,
    "torchtitan": torchtitan,
    "st-moe-pytorch": st_moe,
    "mixture-of-experts": mixture_of_experts,
}


class Block(nn.Module):
    def __init__(self, s: SimpleNamespace, layer: Callable[[SimpleNamespace], nn.Module]) -> None:
        super().__init__()
        self.heads = s.heads
        self.before, self.between = (nn.RMSNorm(s.width) for _ in range(2))
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=False)
        self.out = nn.Linear(s.width, s.width, bias=False)
        self.feed = layer(s)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        y, loss = self.feed(self.between(x))
        return x + y.to(x.dtype), loss


class Decoder(nn.Module):
    def __init__(self, s: SimpleNamespace, layer: Callable[[SimpleNamespace], nn.Module]) -> None:
        super().__init__()
        self.embed = nn.Embedding(s.vocabulary, s.width)
        self.blocks = nn.ModuleList(Block(s, layer) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.width)
        self.head = nn.Linear(s.width, s.vocabulary, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        hidden, extra = self.embed(x), 0.0
        for block in self.blocks:
            hidden, loss = block(hidden)
            extra = extra + loss
        return F.cross_entropy(self.head(self.norm(hidden)).float().flatten(0, 1), y.flatten()) + extra


def build(kind: str, s: SimpleNamespace) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """The model and its loss."""
    if kind != "transformers":
        model = Decoder(s, LAYERS[kind])
        return model, model
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=s.vocabulary, hidden_size=s.width, intermediate_size=s.hidden, num_hidden_layers=s.layers,
        num_attention_heads=s.heads, num_key_value_heads=s.heads, num_local_experts=s.experts,
        num_experts_per_tok=s.top_k, sliding_window=None, max_position_embeddings=s.length, output_router_logits=True,
    )  # fmt: skip
    theirs = MixtralForCausalLM(config).train()
    return theirs, lambda x, y: theirs(input_ids=x, labels=x, use_cache=False).loss


def main(s: SimpleNamespace, kind: str) -> None:
    """Step until stdin ends."""
    torch.manual_seed(0)
    model, loss = build(kind, s)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(s.vocabulary, (64, s.rows, s.length + 1))
    done = 0
    for line in sys.stdin:
        if line.strip() != "step":
            print(json.dumps({"bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}), flush=True)
            continue
        batch = ids[done % len(ids)]
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            found = loss(batch[:, :-1], batch[:, 1:])
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
        print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)


if __name__ == "__main__":
    main(SimpleNamespace(**json.loads(sys.argv[1])), sys.argv[2])
