"""A tiny Decoder trained for a few steps on a fixed global batch, at any layout, with everything observable returned.

The same rows go to one rank or many; each rank returns its own tensors and where they lie in the global ones, and
`whole` puts them together. What it observes of each token carries the token's index, and `gathered` sorts by it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from turnout.kernels import cross_entropy
from turnout.moe.config import AttentionConfig, EncoderConfig, ModelConfig, MoEConfig
from turnout.moe.data.rows import Batch, Source
from turnout.moe.models.decoder import Decoder
from turnout.moe.models.init import init_weights
from turnout.moe.routing.bias import update_biases
from turnout.moe.shapes import is_router
from turnout.moe.train.config import OptimConfig
from turnout.moe.train.optim import build_optimizers
from turnout.moe.train.part import part_of
from turnout.moe.train.recompute import recompute
from turnout.parallel import process
from turnout.parallel.apply import parallelize
from turnout.parallel.config import ParallelConfig
from turnout.parallel.engine.fsdp import FsdpEngine
from turnout.parallel.engine.native import NativeEngine
from turnout.parallel.engine.pipeline import PipelineEngine
from turnout.parallel.fsdp import divide, own_parameters
from turnout.parallel.mesh import build_mesh
from turnout.parallel.pipeline import keep_stages
from turnout.parallel.shard import ShardSpec
from turnout.parallel.stages import held

ROWS, LENGTH, VOCAB, WIDTH, EXPERTS = 8, 12, 40, 16, 4
SOURCE = 9  # tokens of a row that an encoder reads
HOT = 1  # the expert that the case "hot" sends every token to


@dataclass(frozen=True)
class Case:
    """One configuration of the tiny run.

    `split` says how many of the 8 rows each data-parallel rank gets (None = equally), `sizes` the other fields of
    `ParallelConfig`, `moe` and `model` other fields of `MoEConfig` and `ModelConfig`; `dense` has no experts,
    `encoder` puts two blocks before the decoder's, `documents` cuts rows into documents, `optim` takes the run's own
    optimizers in place of `optimizer`, `autocast` is the forward pass's dtype.
    """

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
    compile: str | None = None  # backend
    sizes: tuple[tuple[str, Any], ...] = ()
    moe: tuple[tuple[str, Any], ...] = ()
    model: tuple[tuple[str, Any], ...] = ()
    dense: bool = False
    encoder: bool = False
    documents: bool = False
    optim: OptimConfig | None = None
    autocast: torch.dtype | None = None

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(ep=self.ep, **dict(self.sizes))


def model_config(case: Case) -> ModelConfig:
    moe = {
        "width": WIDTH, "expert_width": 8, "num_experts": EXPERTS, "top_k": 1 if case.router == "switch" else 2,
        "router": case.router, "capacity_factor": case.capacity_factor, "min_capacity": 1, "every": 1, "jitter": 0.01,
    }  # fmt: skip
    model = {
        "vocab_size": VOCAB, "width": WIDTH, "layers": 2, "heads": 2, "kv_heads": 1, "head_dim": 8, "ffn_width": 24,
        "max_seq_len": LENGTH, "moe": None if case.dense else MoEConfig(**{**moe, **dict(case.moe)}),
    }  # fmt: skip
    if case.encoder:
        attention = AttentionConfig(positions="relative", buckets=8, max_distance=6)
        model |= {"encoder": EncoderConfig(layers=2), "attention": attention, "activation": "relu"}
    return ModelConfig(**{**model, **dict(case.model)})


def build_model(case: Case) -> Decoder:
    """All experts, on one rank, the same at every layout. The router is sharpened so that no choice is a near-tie."""
    model = Decoder(model_config(case))
    init_weights(model, seed=1)
    direction = torch.nn.functional.normalize(torch.ones(WIDTH), dim=0)
    with torch.no_grad():
        model.embed.weight.mul_(8)
        for layer in model.cfg.moe_layers:
            weight = getattr(model.all_blocks[layer].ffn.router, "weight", None)
            if weight is not None:
                weight.mul_(10)
            if case.hot:
                weight[HOT] = 20 * direction
        for name, weight in model.named_parameters():
            if name.endswith((".bias", ".sinks", ".b_in", ".b_out")) and not is_router(name):
                weight.copy_(torch.linspace(-1, 1, weight.numel()).view_as(weight))
        if case.hot:
            model.embed.weight.add_(3 * direction)
    return model.to(case.dtype)


def rows_of(case: Case, rank: int, size: int) -> list[int]:
    """The rows of the global batch that data-parallel `rank` of `size` reads."""
    split = case.split or (ROWS // size,) * size
    if size == 1:
        split = (ROWS,)
    first = sum(split[:rank])
    return list(range(first, first + split[rank]))


def batch_of(case: Case, rows: list[int], step: int) -> Batch:
    """Some rows of a step's global batch."""
    generator = torch.Generator().manual_seed(50 + step)
    tokens_RS = torch.randint(VOCAB, (ROWS, LENGTH), generator=generator)
    valid_RS = torch.arange(LENGTH) < LENGTH - torch.arange(ROWS)[:, None] % 4  # rows end in 0 to 3 padding tokens
    targets_RS = tokens_RS.roll(-1, 1).masked_fill(~valid_RS, -1)
    pick = torch.tensor(rows, dtype=torch.int64)
    starts = torch.arange(len(rows) * LENGTH) % LENGTH == 0
    if case.documents:
        starts |= tokens_RS[pick].flatten() < VOCAB // 5
    borders = torch.cat([starts.nonzero().flatten(), torch.tensor([len(rows) * LENGTH])])
    place_T = torch.arange(len(rows) * LENGTH)
    return Batch(
        tokens_T=tokens_RS[pick].flatten(),
        targets_T=targets_RS[pick].flatten(),
        positions_T=place_T - borders[torch.searchsorted(borders, place_T, right=True) - 1],
        cu_seqlens=borders.int(),
        cu_rows=torch.arange(len(rows) + 1, dtype=torch.int32) * LENGTH,
        valid_T=valid_RS[pick].flatten(),
        index_T=torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)[pick].flatten(),
        total_tokens=int(valid_RS.sum()),
        source=source_of(pick, step) if case.encoder else None,
    )


def source_of(pick: Tensor, step: int) -> Source:
    """What the encoder reads beside these rows."""
    tokens_RS = torch.randint(VOCAB, (ROWS, SOURCE), generator=torch.Generator().manual_seed(70 + step))
    return Source(
        tokens_S=tokens_RS[pick].flatten(),
        positions_S=torch.arange(SOURCE).repeat(len(pick)),
        cu_rows=torch.arange(len(pick) + 1, dtype=torch.int32) * SOURCE,
        index_S=torch.arange(ROWS * SOURCE).view(ROWS, SOURCE)[pick].flatten(),
        total_tokens=ROWS * SOURCE,
    )


def run_step(engine, case: Case, micro: list[list[int]], step: int) -> list[dict[str, Tensor]]:
    """The gradient of a step whose micro-batches have these rows; what was seen of each micro-batch."""
    parts, losses, tally = [], {}, {}

    def inputs(number: int) -> tuple:
        batch = batch_of(case, micro[number], step)
        parts.append(part_of(batch, engine.mesh, step=step, seed=9, tally=tally))
        return parts[-1].inputs

    def loss(number: int, logits_TV: Tensor) -> Tensor:
        mine = cross_entropy(logits_TV, parts[number].targets_T).sum() / parts[number].total_tokens
        losses[number] = mine.detach()
        return mine

    engine.accumulate(len(micro), inputs, loss)
    return [observe(part, losses.get(number)) for number, part in enumerate(parts)]


def observe(part, loss: Tensor | None) -> dict[str, Tensor]:
    """This rank's parts of the losses, and the routings with the index of their tokens."""
    seen = {"loss": torch.zeros(()) if loss is None else loss, "index": part.ctx.route.index_T}
    if part.source is not None:
        seen |= {"source index": part.source[2].route.index_T}
    for layer, routing in part.routings.items():
        seen |= {f"{name}/{layer}": value.detach() for name, value in routing.aux.items()}
        seen |= {f"ids/{layer}": routing.ids_TK, f"kept/{layer}": routing.kept_TK}
        seen |= {f"logits/{layer}": routing.logits_TE, f"counts/{layer}": routing.counts_E}
    return seen


def run_batch(engine, case: Case, rows: list[int], step: int, last: bool) -> None:
    """Forward and backward of some rows; with `last`, gradients are summed."""
    part = part_of(batch_of(case, rows, step), engine.mesh, step=step, seed=9)
    loss = cross_entropy(engine.forward(*part.inputs), part.targets_T).sum() / part.total_tokens
    engine.backward(loss, last=last)


def start(case: Case):
    """This rank's engine."""
    mesh = build_mesh(case.parallel, "cpu", EXPERTS)
    model = build_model(case)
    shards = parallelize(model, mesh)
    if mesh.layout.pp > 1:
        stages = stages_of(case, model, mesh)
        keep_stages(model, stages, mesh.layout.pp * len(stages) - 1)
    if case.parallel.fsdp:
        shards = divide(model, model.all_blocks, mesh, shards, is_router, case.autocast)
    if case.compile:
        from turnout.moe.train.compiled import compile_blocks

        compile_blocks(model, case.compile)
    recompute(model, case.recompute)
    return build_engine(case, model, mesh, shards)


def train(case: Case) -> dict:
    """Train `case.steps` steps on this rank's rows. Returns this rank's view; see `whole`."""
    engine = start(case)
    model, mesh, shards = engine.model, engine.mesh, engine.shards
    rows = rows_of(case, mesh.dp_rank, mesh.dp_size)
    size = -(-len(rows) // case.micro_batches)
    micro = [rows[i * size : (i + 1) * size] for i in range(case.micro_batches)]
    seen: dict = {"first": [m.experts.first for m in model.modules() if hasattr(m, "experts")]}
    seen |= {"curve": [], "steps": []}
    for step in range(case.steps):
        parts = run_step(engine, case, micro, step)
        seen["curve"].append(float(process.all_sum(sum(part["loss"] for part in parts).double())))
        if step == 0:
            seen["parts"] = parts
            mine = own_parameters(model).items()
            seen["grads"] = {name: p.grad.clone() for name, p in mine if p.grad is not None}
        seen["steps"].append(engine.step())
        if dict(case.moe).get("bias_rate"):
            move_biases(model, parts, mesh)
    with engine.whole():
        seen["parameters"] = {name: p.detach().clone() for name, p in own_parameters(model).items()}
    seen["biases"] = {name: b.clone() for name, b in model.named_buffers() if name.endswith("balance_bias")}
    seen["shards"] = shards
    return seen


def move_biases(model, parts: list[dict[str, Tensor]], mesh) -> None:
    counts = {int(k.split("/")[1]): sum(p[k] for p in parts) for k in parts[0] if k.startswith("counts/")}
    update_biases(model, {layer: mesh.sum(count_E, "stage") for layer, count_E in counts.items()})


def stages_of(case: Case, model, mesh) -> dict[int, range]:
    return held(model.cfg.layers, mesh.layout.pp, case.parallel.virtual, mesh.place["pp"])


def build_engine(case: Case, model, mesh, shards):
    engine = partial(
        FsdpEngine if case.parallel.fsdp else NativeEngine,
        model,
        mesh=mesh,
        shards=shards,
        clip=case.clip,
        dtype=case.autocast,
    )
    if case.optim is not None:
        return engine(build_optimizers(model, case.optim, shards, 5, mesh))
    kinds = {"sgd": (torch.optim.SGD, 0.5), "adamw": (torch.optim.AdamW, 1e-2)}
    optimizer, lr = kinds[case.optimizer]
    by_decay: dict[float, list] = {}
    for parameter in own_parameters(model).values():
        by_decay.setdefault(case.decay if parameter.dim() > 1 else 0.0, []).append(parameter)
    groups = [{"params": some, "weight_decay": decay} for decay, some in by_decay.items()]
    if case.engine == "deepspeed":
        from turnout.parallel.engine.deepspeed import DeepSpeedEngine
        from turnout.parallel.engine.zero3 import Zero3Engine

        some: dict[str, Any] = {"clip": case.clip, "dtype": case.autocast}
        if case.zero == 3:
            return Zero3Engine(model, [optimizer(groups, lr=lr)], mesh, shards, units=model.blocks, **some)
        return DeepSpeedEngine(model, [optimizer(groups, lr=lr)], mesh, shards, stage=case.zero, **some)
    if mesh.layout.pp > 1:
        return PipelineEngine(
            model, [optimizer(groups, lr=lr)], mesh, shards, stages_of(case, model, mesh), width=WIDTH,
            clip=case.clip, schedule=case.parallel.schedule,
            tied=("embed.weight",) if model.cfg.tie_embeddings else (),
        )  # fmt: skip
    return engine([optimizer(groups, lr=lr)])


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
            block, local = spec.block, local.view(spec.unfold(local.shape))
            place = tuple(slice(o, o + n) for o, n in zip(block.offset, local.shape, strict=True))
            target, known = target.view(block.global_shape), known.view(block.global_shape)
            assert torch.equal(target[place][known[place]], local[known[place]]), f"replicas of {name} differ"
            target[place], known[place] = local, True
    assert all(bool(known.all()) for known in filled.values()), "a part of a tensor is on no rank"
    return together


def summed(views: list[dict], name: str) -> float:
    """The sum of a loss's parts over ranks, layers and micro-batches."""
    return sum(float(v) for view in views for p in view["parts"] for key, v in p.items() if key.startswith(name))


def gathered(views: list[dict], name: str, by: str = "index") -> Tensor:
    """A per-token record of step 0 in global token order."""
    parts = [part for view in views for part in view["parts"] if name in part]
    order = torch.cat([part[by] for part in parts]).argsort()
    return torch.cat([part[name] for part in parts])[order]
