"""A tiny Decoder trained for a few steps on a fixed global batch, at any layout, with everything observable returned.

The same rows go to one rank or many; each rank returns its own tensors and where they lie in the global ones, and
`whole` puts them together.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from turnout.kernels import cross_entropy
from turnout.moe.config import ModelConfig, MoEConfig
from turnout.moe.models.context import VarlenContext
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.init import init_weights
from turnout.moe.routing.record import RouteContext
from turnout.moe.train.recompute import recompute
from turnout.parallel import process
from turnout.parallel.apply import parallelize
from turnout.parallel.config import ParallelConfig
from turnout.parallel.engine.native import NativeEngine
from turnout.parallel.mesh import build_mesh
from turnout.parallel.shard import ShardSpec

ROWS, LENGTH, VOCAB, WIDTH, EXPERTS = 8, 12, 40, 16, 4
HOT = 1  # the expert that the case "hot" sends every token to


@dataclass(frozen=True)
class Case:
    """One configuration of the tiny run; `split` says how many of the 8 rows each rank gets (None = equally)."""

    router: str = "switch"
    dtype: torch.dtype = torch.float64
    optimizer: str = "adamw"
    capacity_factor: float | None = 1.25
    hot: bool = False
    split: tuple[int, ...] | None = None
    micro_batches: int = 1
    ep: int = 1
    engine: str = "native"
    clip: float = 0.05
    decay: float = 0.0
    zero: int = 1
    steps: int = 3
    recompute: str = "none"


def model_config(case: Case) -> ModelConfig:
    moe = MoEConfig(
        width=WIDTH, expert_width=8, num_experts=EXPERTS, top_k=1 if case.router == "switch" else 2,
        router=case.router, capacity_factor=case.capacity_factor, min_capacity=1, every=1, jitter=0.01,
    )  # fmt: skip
    return ModelConfig(
        vocab_size=VOCAB, width=WIDTH, layers=2, heads=2, kv_heads=1, head_dim=8, ffn_width=24,
        max_seq_len=LENGTH, moe=moe,
    )  # fmt: skip


def build_model(case: Case) -> Decoder:
    """All experts, on one rank, the same at every layout. The router is sharpened so that no choice is a near-tie."""
    model = Decoder(model_config(case))
    init_weights(model, seed=1)
    direction = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
    with torch.no_grad():
        model.embed.weight.mul_(8)
        for block in model.blocks:
            block.ffn.router.weight.mul_(10)
            if case.hot:
                block.ffn.router.weight[HOT] = 20 * direction
        if case.hot:
            model.embed.weight.add_(3 * direction)
    return model.to(case.dtype)


def rows_of(case: Case, rank: int, world: int) -> list[int]:
    """The rows of the global batch that this rank reads."""
    split = case.split or (ROWS // world,) * world
    if world == 1:
        split = (ROWS,)
    first = sum(split[:rank])
    return list(range(first, first + split[rank]))


def run_batch(engine, case: Case, rows: list[int], step: int, last: bool) -> dict[str, Tensor]:
    """Forward and backward of some rows: this rank's parts of the losses, and the routings."""
    generator = torch.Generator().manual_seed(50 + step)
    tokens_RS = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    valid_RS = torch.arange(LENGTH) < LENGTH - torch.arange(ROWS)[:, None] % 4  # rows end in 0 to 3 padding tokens
    targets_RS = tokens_RS.roll(-1, 1).masked_fill(~valid_RS, -1)
    index_RS = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    pick = torch.tensor(rows, dtype=torch.int64)
    cu = torch.arange(len(rows) + 1) * LENGTH
    route = RouteContext(
        cu_groups=cu, valid_T=valid_RS[pick].flatten(), index_T=index_RS[pick].flatten(),
        step=step, seed=9, total_tokens=int(valid_RS.sum()),
    )  # fmt: skip
    ctx = VarlenContext(cu, route)
    logits_TV = engine.forward(tokens_RS[pick].flatten(), torch.arange(LENGTH).repeat(len(rows)), ctx)
    loss = cross_entropy(logits_TV, targets_RS[pick].flatten()).sum() / int((targets_RS >= 0).sum())
    engine.backward(loss, last=last)
    parts = {"loss": loss.detach()}
    for layer, routing in ctx.routings.items():
        parts |= {f"{name}/{layer}": value.detach() for name, value in routing.aux.items()}
        parts |= {f"ids/{layer}": routing.ids_TK, f"kept/{layer}": routing.kept_TK}
        parts[f"logits/{layer}"] = routing.logits_TE.detach()
    return parts


def train(case: Case) -> dict:
    """Train `case.steps` steps on this rank's rows. Returns this rank's view; see `whole`."""
    mesh = build_mesh(ParallelConfig(ep=case.ep), "cpu", EXPERTS)
    model = build_model(case)
    shards = parallelize(model, mesh)
    recompute(model, case.recompute)
    engine = build_engine(case, model, mesh, shards)
    rows = rows_of(case, mesh.rank, mesh.world)
    seen: dict = {"first": [block.ffn.experts.first for block in model.blocks], "curve": [], "steps": []}
    for step in range(case.steps):
        size = -(-len(rows) // case.micro_batches)
        micro = [rows[i * size : (i + 1) * size] for i in range(case.micro_batches)]
        parts = [run_batch(engine, case, some, step, last=some is micro[-1]) for some in micro]
        seen["curve"].append(float(process.all_sum(sum(p["loss"] for p in parts))))
        if step == 0:
            seen["parts"] = parts
            seen["grads"] = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        seen["steps"].append(engine.step())
    seen["parameters"] = {name: p.detach().clone() for name, p in model.named_parameters()}
    seen["shards"] = shards
    return seen


def build_engine(case: Case, model, mesh, shards):
    kinds = {"sgd": (torch.optim.SGD, 0.5), "adamw": (torch.optim.AdamW, 1e-2)}
    kind, lr = kinds[case.optimizer]
    by_decay: dict[float, list] = {}
    for parameter in model.parameters():
        by_decay.setdefault(case.decay if parameter.dim() > 1 else 0.0, []).append(parameter)
    groups = [{"params": some, "weight_decay": decay} for decay, some in by_decay.items()]
    if case.engine == "deepspeed":
        from turnout.parallel.engine.deepspeed import DeepSpeedEngine

        return DeepSpeedEngine(model, [kind(groups, lr=lr)], mesh, shards, clip=case.clip, stage=case.zero)
    return NativeEngine(model, [kind(groups, lr=lr)], mesh, shards, clip=case.clip)


def whole(views: list[dict], what: str) -> dict[str, Tensor]:
    """Put every rank's "grads" or "parameters" together; replicas must agree bit for bit.

    A slice's place comes from its ShardSpec alone, so a wrong global expert id shows.
    """
    together: dict[str, Tensor] = {}
    filled: dict[str, Tensor] = {}
    for view in views:
        for name, local in view[what].items():
            spec: ShardSpec = view["shards"][name]
            target = together.setdefault(name, torch.zeros(spec.global_shape, dtype=local.dtype))
            known = filled.setdefault(name, torch.zeros(spec.global_shape, dtype=torch.bool))
            place = tuple(slice(o, o + n) for o, n in zip(spec.offset, local.shape, strict=True))
            assert torch.equal(target[place][known[place]], local[known[place]]), f"replicas of {name} differ"
            target[place], known[place] = local, True
    assert all(bool(known.all()) for known in filled.values()), "a part of a tensor is on no rank"
    return together


def summed(views: list[dict], name: str) -> float:
    """The sum of a loss's parts over ranks, layers and micro-batches."""
    return sum(float(v) for view in views for p in view["parts"] for key, v in p.items() if key.startswith(name))


def gathered(views: list[dict], name: str) -> Tensor:
    """A per-token record of step 0 in global token order (ranks read consecutive rows)."""
    return torch.cat([p[name] for view in views for p in view["parts"]])
