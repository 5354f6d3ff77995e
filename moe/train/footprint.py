"""What one rank of a training run holds in memory, in bytes, from the frozen configuration alone. No torch here.

    Footprint(config, layout, stage=0, cpu=False).total

W tokens of a micro-batch in R rows of S; of these a rank attends for A = W / cp and holds T = A / tp between layers. D
width, H heads, G kv heads (of a tp rank), d head size, F hidden width, E experts, K choices, V vocabulary, b bytes of a
number in `train.dtype`. Under bfloat16 autocast matrix products keep bfloat16 copies of their operands; the residual
stream, the norms, the routers and the loss stay float32. Kept for backward:

    norm            T (8 D + 4), on a CPU T (4 D + 4)            input, normalised input, 1 / rms
    attention       i + A (8 d + 3 b H d) + 2 W b G d + P        operand(s) of q, k, v: i = T · 3 · 2 D or T · 4 D, and
                                                                 A b D when tp gathers it; cos and sin; q, o, operand of
                                                                 W_o; k and v, which cp gathers
    P               A H S b, the probabilities (bfloat16 on a CPU), or 4 A H + b (H / G) S², logsumexp and mask
    feed-forward    A b (D + a F / tp), a = 4 (SwiGLU), 2 (GELU), 1 (ReLU)
    sparse          T (4 D + 20 E + 20 K + 16)                   router, and the order of the assignments
                    + N' b (D + a F) + N b D                     N' rows computed here, N rows sent and back again
                    T b D + N' b 2 F                             in its place on a CPU, SwiGLU experts that are whole
                    + N' F with expert dropout                   its mask
                    + 16 N' when experts are spread              the order of arrival
    shared experts  a feed-forward of T tokens, and with a gate 2 b T D more
    head            T (2 b D + 16) + 4 V D                       operand and its gradient, ids, the matrix's gradient

N is T K, or with slots what finds one when every token draws its experts evenly. Segments shorter than a row keep less
of P; masks of a byte a token and sums of a number an expert are left out. `train.recompute` has a block's rest again in
the backward pass: `selective` keeps the input in place of all that a feed-forward network or an expert stack keeps,
`full` of a block T · 4 D and the record of its routing, T (16 E + 16 K).

A pipeline rank keeps this for every micro-batch in flight: all of them under gpipe; min(m, pp - stage) under 1f1b; and
min(m v, (v - 1) pp + 2 (pp - stage) - 1) parts of 1 / v each when v interleave (Narayanan et al. 2104.04473 §2.2).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from math import ceil, erfc, exp, pi, sqrt

from ...parallel.config import Layout
from ...parallel.stages import held as stages_of
from .. import shapes
from ..config import ModelConfig, MoEConfig
from ..shapes import Part
from .attended import attention
from .config import RunConfig
from .held import NARROW, WIDE, Held
from .narrow import narrow_gradients

KEPT = {"swiglu": 4, "swiglu_clamped": 7, "gelu": 2, "relu": 1}  # hidden widths that an activation function keeps
CHUNK, FEWEST = 1 << 23, 256  # kernels/torch_ops/loss.py: logits that exist at once, and the fewest rows of them
BUCKET = WIDE * 500_000_000  # DeepSpeed's buffer of gradients that are summed together


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    Args:
        config: the run.
        layout: how its ranks share it.
        cpu: whether attention takes the CPU's form.
        collapsed: every token of every rank asks for experts of this one, as far as capacity lets it.
        stage: which of the pipeline's ranks.
    """

    config: RunConfig
    layout: Layout
    cpu: bool = False
    collapsed: bool = False
    stage: int = 0

    @property
    def layers(self) -> tuple[int, ...]:
        """Those computed here."""
        return _layers(self.config.model.layers, self.layout.pp, self.config.parallel.virtual, self.stage)

    @cached_property
    def held(self) -> Held:
        """Weights, gradients, states."""
        return Held(self.config, self.layout, self.layers, self.cpu and narrow_gradients(self.config, self.layout))

    weights = property(lambda self: self.held.weights, doc="Parameters, float32.")
    gradients = property(lambda self: self.held.gradients, doc="Gradients.")
    optimizer = property(lambda self: self.held.optimizer, doc="The optimizer's states.")
    workspace = property(lambda self: self.held.workspace, doc="What the optimizer's step takes for a moment.")

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.config.train.micro_batch or self.config.train.global_batch // self.layout.dp

    @property
    def read(self) -> int:
        """W."""
        return self.rows * self.config.train.seq_len

    @property
    def attended(self) -> int:
        """A."""
        return self.read // self.layout.cp

    @property
    def tokens(self) -> int:
        """T."""
        return self.attended // self.layout.tp

    @property
    def width(self) -> int:
        """b: bytes of a number in the forward pass."""
        return WIDE if self.config.train.dtype == "float32" else 2

    @property
    def activations(self) -> int:
        """Saved for backward by the micro-batches in flight, without `casts`."""
        ends = (self.norm + self.head) * (self.in_flight if self.config.parallel.schedule == "gpipe" else 1)
        virtual = self.config.parallel.virtual
        return ceil(self.blocks * self.in_flight / virtual) + (ends if self._last else 0)

    @cached_property
    def blocks(self) -> int:
        """Saved by all blocks here for one micro-batch."""
        return sum(count * self.kept(sparse) for sparse, count in self._blocks)

    @property
    def in_flight(self) -> int:
        """Micro-batches, or with virtual stages parts of them, whose backward pass is still to come."""
        layout, parallel = self.layout, self.config.parallel
        count = self.config.micro_batches(layout.dp)
        if layout.pp == 1:
            return 1
        if parallel.schedule == "gpipe":
            return count
        if parallel.virtual == 1:
            return min(count, layout.pp - self.stage)
        return min(count * parallel.virtual, (parallel.virtual - 1) * layout.pp + 2 * (layout.pp - self.stage) - 1)

    def kept(self, sparse: bool) -> int:
        """Saved by one block."""
        how, model, moe = self.config.train.recompute, self.config.model, self.config.model.moe
        if how == "full":
            routed = 16 * (moe.num_experts + choices(moe)) if sparse and moe else 0
            return self.tokens * (WIDE * model.width + routed)
        found = 2 * self.norm + self.attention
        if how == "none":
            return found + self._feed(sparse)
        if sparse and moe:
            return found + self.router(moe) + self.exchanged(moe)
        return found + self._operand * model.width

    def again(self, sparse: bool) -> int:
        """What the backward pass of one block takes: two hidden gradients, and what is computed again of it."""
        how, model, moe = self.config.train.recompute, self.config.model, self.config.model.moe
        hidden = self.received(moe) * moe.expert_width if sparse and moe else self.tokens * model.ffn_width
        gradients = self._through(moe) if sparse and moe and self._fused(moe) else 2 * self.width * hidden
        if how == "none":
            return gradients
        full, parts = how == "full", self._block(sparse)
        weights = self._casts(part for part in parts if full or ".ffn." in part.name)
        return gradients + weights + (2 * self.norm + self.attention if full else 0) + self._feed(sparse)

    @property
    def norm(self) -> int:
        """One norm."""
        return self.tokens * ((1 if self.cpu else 2) * WIDE * self.config.model.width + WIDE)

    @cached_property
    def attention(self) -> int:
        """One block's attention."""
        return attention(
            self.config, tokens=self.tokens, attended=self.attended, read=self.read, width=self.width,
            tp=self.layout.tp, cpu=self.cpu,
        )  # fmt: skip

    def feed_forward(self, hidden: int, activation: str = "swiglu", tp: int = 1) -> int:
        """One dense feed-forward network of that hidden width, divided over `tp` ranks."""
        return self.tokens * tp * self.width * (self.config.model.width + KEPT[activation] * hidden // tp)

    def sparse(self, moe: MoEConfig) -> int:
        """One MoE layer: router, experts, shared experts."""
        kept = (2 if self._fused(moe) else KEPT[moe.activation]) * moe.expert_width
        each = self.width * kept + (moe.expert_width if moe.expert_dropout else 0)
        found = self.router(moe) + self.received(moe) * each + self.exchanged(moe)
        if moe.shared_experts:
            found += self.feed_forward(moe.shared_width or moe.shared_experts * moe.expert_width, moe.activation)
        return found + 2 * self.width * self.tokens * moe.width if moe.shared_gate else found

    def router(self, moe: MoEConfig) -> int:
        """What chooses, and the order of the assignments."""
        return self.tokens * (WIDE * moe.width + 20 * moe.num_experts + 20 * choices(moe) + 16)

    def exchanged(self, moe: MoEConfig) -> int:
        """Rows that go to the experts and come back, and the order in which they arrive; or tokens that stay."""
        if self._fused(moe) and self.layout.ep == 1:
            return self.tokens * self.width * moe.width
        rows = (self.sent(moe) + self.received(moe)) * self.width * moe.width
        return rows + (16 * self.received(moe) if self.layout.ep > 1 else 0)

    def sent(self, moe: MoEConfig) -> int:
        """N: assignments of this rank's tokens that find a slot, in the mean of tokens that choose alike and apart.

        Collapsed: those that may find one. Under expert choice all slots are taken.
        """
        wanted, row = self.tokens * choices(moe), self.layout.cp * self.layout.tp
        if not self.slots(moe):
            return wanted
        if self.collapsed or moe.router == "expert_choice":
            return min(wanted, self.slots(moe) * moe.num_experts // row)
        groups = 1 if moe.group == "rank" else self.rows
        asked = wanted * row / groups / moe.num_experts
        kept = mean_up_to(self.slots(moe) / groups, asked, asked * (1 - 1 / moe.num_experts))
        return min(wanted, ceil(kept * groups * moe.num_experts / row))

    def received(self, moe: MoEConfig) -> int:
        """N': rows that the experts here compute at once: what is sent when load is even, or all that can come."""
        layout, most = self.layout, self.config.parallel.exchange_rows
        if not self.collapsed or layout.ep == 1:
            found = self.sent(moe)
        else:
            experts, row = moe.num_experts // layout.ep, layout.cp * layout.tp
            of_each = self.tokens * min(choices(moe), experts)
            found = layout.ep * min(of_each, self.slots(moe) * experts // row or of_each)
        return found if most is None or layout.ep == 1 else min(found, most)

    def slots(self, moe: MoEConfig) -> int:
        """Slots of one expert over the micro-batch's groups (`capacity.py`'s formula); 0 = dropless."""
        if moe.capacity_factor is None or moe.router == "dense":
            return 0
        groups, size = (1, self.read) if moe.group == "rank" else (self.rows, self.config.train.seq_len)
        wanted = ceil(Fraction(str(moe.capacity_factor)) * size * moe.top_k / moe.num_experts)
        return groups * min(max(wanted, moe.min_capacity), size)

    @property
    def travelling(self) -> int:
        """What a pipeline's schedule receives into: x of every micro-batch, and its gradient, in float32."""
        layout, count = self.layout, self.config.micro_batches(self.layout.dp)
        ways = self.config.parallel.virtual * 2 - (self.stage == 0) - (self.stage == layout.pp - 1)
        return ways * count * WIDE * self.tokens * self.config.model.width

    @property
    def head(self) -> int:
        """Operand of the head and its gradient, that of the matrix, token and target ids."""
        model = self.config.model
        return self.tokens * (2 * self.width * model.width + 16) + WIDE * model.vocab_size * model.width

    @cached_property
    def casts(self) -> int:
        """Copies of the matrices in `train.dtype`, kept for backward; neither the head's nor those of fused experts.

        Every micro-batch in flight has its own. Under FSDP2 the model's ends, gathered in float32, are beside them, and
        blocks are gathered in `train.dtype`: these need no copies. Under ZeRO-3 the ends and a block in float32, and
        the matrices that products keep when nothing is recomputed.
        """
        again = {"none": "-", "selective": ".ffn.", "full": "blocks."}[self.config.train.recompute]
        kept = [part for part in self.held.parts if again not in part.name]
        if self.held.zero == 3:
            ends = sum(part.count for part in self.held.parts if not part.name.startswith("blocks."))
            largest = max(sum(p.count for p in self._block(sparse)) for sparse, _ in self._blocks)
            matrices = sum(part.count for part in kept if shapes.is_hidden_matrix(part.name, len(part.shape)))
            return WIDE * (ends + largest) + self.width * matrices
        return WIDE * self.held.ends + ceil(self._casts(kept) * self.in_flight / self.config.parallel.virtual)

    @property
    def gathered(self) -> int:
        """What FSDP2 has of a block in its backward pass: its weights and the next one's in `train.dtype`, its gradient
        in that type and, to be summed, in float32; beside them the whole gradient of the model's ends, in float32."""
        blocks = max(self.held.divided(self._block(sparse)) for sparse, _ in self._blocks)
        return ((min(2, len(self.layers)) + 1) * self.width + WIDE) * blocks + WIDE * self.held.ends

    def _casts(self, parts: Iterable[Part]) -> int:
        """Of these under autocast."""
        return 0 if self.width == WIDE else self.width * sum(part.count for part in parts if self._is_cast(part))

    def _is_cast(self, part: Part) -> bool:
        moe = self.config.model.moe
        if moe and self._fused(moe) and shapes.is_expert(part.name):
            return False
        return shapes.is_hidden_matrix(part.name, len(part.shape)) and not self.held.divides(part)

    @property
    def logits(self) -> int:
        """Those of a chunk of tokens, a part of the matrix's gradient, and the matrix where it is cast."""
        model, copies = self.config.model, 1 if self.width == WIDE else 2
        rows = min(max(CHUNK // model.vocab_size, FEWEST), self.tokens)
        return self.width * model.vocab_size * (rows + copies * model.width) if self._last else 0

    @property
    def buffers(self) -> int:
        """One layer's rows as they arrive and in the experts' order: one layer travels at a time.

        Of `parallel.chunks` parts all set out at once and one at a time is put in order; a round, all of it. DeepSpeed
        has a buffer for gradients.
        """
        moe, parallel = self.config.model.moe, self.config.parallel
        parts = 1 if parallel.exchange_rows else parallel.chunks
        bucket = BUCKET if self.held.zero else 0
        if moe is None or self.layout.ep == 1 or not self.sparse_layers:
            return bucket
        return bucket + ceil(self.width * self.received(moe) * moe.width * (1 + 1 / parts))

    @cached_property
    def total(self) -> int:
        """The peak: what lasts, and the largest of what micro-batches and a step take."""
        return self.weights + self.gradients + self.optimizer + self.travelling + max(self.passing, self.workspace)

    @cached_property
    def passing(self) -> int:
        """The largest of a forward pass's end, a loss and a block's backward pass."""
        model, ends = self.config.model, (self.norm + self.head) if self._last else 0
        tied, table = model.tie_embeddings and self._last, WIDE * model.vocab_size * model.width
        kept = self.activations - ends
        block = max(self.again(sparse) for sparse, _ in self._blocks) + (table if tied else 0)  # waits for the lookup's
        micro = self.casts + kept + max(ends + self.logits, block + self.buffers)
        if self.config.parallel.fsdp:
            return max(micro, self.casts + kept + block + self.buffers + self.gathered)
        cached = self._casts(part for part in self.held.parts if not shapes.is_expert(part.name))
        return max(micro, cached + kept + ends, cached + table * (3 if tied else 1))

    @property
    def kv_token(self) -> int:
        """Keys and values of one token in serving, in `train.dtype`."""
        return shapes.KVForm.of(self.config.model).numbers * self.width

    def _feed(self, sparse: bool) -> int:
        """The feed-forward slot of one block."""
        model = self.config.model
        return (
            self.sparse(model.moe)
            if sparse and model.moe
            else self.feed_forward(model.ffn_width, model.activation, self.layout.tp)
        )

    def _through(self, moe: MoEConfig) -> int:
        """Of fused experts' backward pass: gradients of weights and rows; of one expert casts and hidden rows."""
        experts, rows = (part for part in self._block(True) if shapes.is_expert(part.name)), self.received(moe)
        whole = 0 if self.held.zero else sum(part.count for part in experts if not self.held.divides(part))
        weights = whole * (NARROW if self.held.narrow else WIDE)  # others are counted where they are gathered, summed
        each = rows if self.collapsed else ceil(rows * self.layout.ep / moe.num_experts)
        matrices = 2 * moe.width if self.width < WIDE else 0
        return weights + self.width * ((rows + self.tokens) * moe.width + 3 * (each + matrices) * moe.expert_width)

    def _fused(self, moe: MoEConfig) -> bool:
        """Whether the experts of a layer are one operation, which keeps no activations."""
        return self.cpu and moe.activation == "swiglu" and not (moe.bias or moe.expert_dropout)

    @property
    def _operand(self) -> int:
        """Bytes a feature of the rows that go into a dense feed-forward network, in the type they come in."""
        return WIDE * self.tokens if self.layout.tp == 1 else self.width * self.attended

    @cached_property
    def _blocks(self) -> list[tuple[bool, int]]:
        """(sparse?, number) of the kinds of blocks here."""
        sparse = self.sparse_layers
        return [(kind, count) for kind, count in ((False, len(self.layers) - sparse), (True, sparse)) if count]

    def _block(self, sparse: bool) -> list[Part]:
        return shapes.block(self.config.model, sparse, self.layout.ep, self.layout.tp)

    @cached_property
    def sparse_layers(self) -> int:
        """Of `layers`, how many are sparse."""
        return _sparse(self.config.model, self.layers)

    @property
    def _last(self) -> bool:
        return self.config.model.layers - 1 in self.layers


@cache
def kinds(model: ModelConfig, pp: int, virtual: int) -> list[int]:
    """The first of each kind of a pipeline's stages: kinds differ in blocks, and in having a beginning or an end."""
    found: dict[tuple[int, int, bool, bool], int] = {}
    for stage in range(pp):
        layers = _layers(model.layers, pp, virtual, stage)
        found.setdefault((len(layers), _sparse(model, layers), 0 in layers, model.layers - 1 in layers), stage)
    return list(found.values())


@cache
def _sparse(model: ModelConfig, layers: tuple[int, ...]) -> int:
    return len(set(layers).intersection(model.moe_layers))


@cache
def _layers(layers: int, pp: int, virtual: int, stage: int) -> tuple[int, ...]:
    return tuple(layer for some in stages_of(layers, pp, virtual, stage).values() for layer in some)


def choices(moe: MoEConfig) -> int:
    """K of the routing record: under expert choice every expert is a choice of every token."""
    return moe.num_experts if moe.router == "expert_choice" else moe.top_k


def mean_up_to(most: float, mean: float, variance: float) -> float:
    """E[min(X, most)] of a normal X."""
    if variance <= 0:
        return min(mean, most)
    z = (most - mean) / sqrt(variance)
    above, density = 0.5 * erfc(z / sqrt(2)), exp(-z * z / 2) / sqrt(2 * pi)
    return mean - sqrt(variance) * density + (most - mean) * above
