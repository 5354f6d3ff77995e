"""What one rank of a training run holds in memory, in bytes, from the frozen configuration alone. No torch here.

    Footprint(config, layout, cpu=False).total

T tokens of a micro-batch in R rows of S, D width, H heads, G kv heads, d head size, F hidden width, E experts,
K choices, V vocabulary, b bytes of a number in `train.dtype`. Under bfloat16 autocast matrix products keep bfloat16
copies of their operands; the residual stream, the norms, the routers and the loss stay float32. Kept for backward:

    norm            T (8 D + 4)                                  input, normalised input, 1 / rms
    attention       T (i + 8 d + b (3 H d + 2 G d)) + A          operand(s) of q, k, v: i = 3 · 2 D or 4 D; cos and sin;
                                                                 q, k, v, o, operand of W_o
    A               T H S b, the probabilities (bfloat16 on a CPU), or 4 T H + b (H / G) S², logsumexp and mask
    feed-forward    T b (D + a F), a = 4 (SwiGLU), 2 (GELU), 1 (ReLU)
    sparse          T (4 D + 20 E + 20 K + 16)                   router, and the order of the assignments
                    + N' b (D + a F) + N b D                     N' rows computed here, N rows sent and back again
                    + N' F with expert dropout                   its mask
                    + 16 N' when experts are spread              the order of arrival
    shared experts  a feed-forward, and with a gate 2 b T D more
    head            T (b D + 4 V + 16)                           operand, log-probabilities, ids

N is at most T K and at most the slots of all experts. Segments shorter than a row keep less of A; masks of a byte a
token and sums of a number an expert are left out.
"""

from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, prod

from ...parallel.config import Layout
from .. import shapes
from ..config import MoEConfig
from .config import RunConfig

WIDE = 4  # bytes of float32: parameters, gradients, optimizer, residual stream
EXPLICIT = 1 << 23  # kernels/torch_ops/attention.py: the most scores that are written out
KEPT = {"swiglu": 4, "gelu": 2, "relu": 1}  # hidden widths that an activation function keeps


@dataclass(frozen=True)
class Footprint:
    """Bytes of one rank.

    Args:
        config: the run.
        layout: how its ranks share it.
        cpu: whether attention takes the CPU's form.
        collapsed: every token of every rank asks for experts of this one, as far as capacity lets it.
    """

    config: RunConfig
    layout: Layout
    cpu: bool = False
    collapsed: bool = False

    # What lasts -------------------------------------------------------------------------------------------------------

    @cached_property
    def shapes(self) -> shapes.Shapes:
        """Parameters held here."""
        return shapes.local(shapes.shapes(self.config.model), self.layout.ep)

    @property
    def weights(self) -> int:
        """Parameters, float32."""
        return WIDE * shapes.count(self.shapes)

    @property
    def gradients(self) -> int:
        """Gradients, float32: as many."""
        return self.weights

    @cached_property
    def optimizer(self) -> int:
        """AdamW: mean, square and (float32) a counter for each tensor; Muon: a momentum; Adafactor: a row, a column."""
        return sum(self._state(name, shape) for name, shape in self.shapes.items())

    # What a micro-batch keeps -----------------------------------------------------------------------------------------

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return self.config.train.micro_batch or self.config.train.global_batch // self.layout.dp

    @property
    def tokens(self) -> int:
        """T."""
        return self.rows * self.config.train.seq_len

    @property
    def width(self) -> int:
        """b: bytes of a number in the forward pass."""
        return WIDE if self.config.train.dtype == "float32" else 2

    @property
    def casts(self) -> int:
        """Bfloat16 copies of the matrices, kept for backward; the head's too, the embedding's lookup needs none."""
        if self.width == WIDE:
            return 0
        head = "embed.weight" if self.config.model.tie_embeddings else "head.weight"
        used = (prod(s) for n, s in self.shapes.items() if n == head or shapes.is_hidden_matrix(n, len(s)))
        return self.width * sum(used)

    @property
    def activations(self) -> int:
        """Saved for backward, without `casts`."""
        model = self.config.model
        sparse, dense = len(model.moe_layers), model.layers - len(model.moe_layers)
        norms = (2 * model.layers + 1) * self.tokens * (2 * WIDE * model.width + WIDE)
        found = norms + model.layers * self.attention + dense * self.feed_forward(model.ffn_width) + self.head
        return found + sparse * self.sparse(model.moe) if model.moe else found

    @property
    def attention(self) -> int:
        """One block's attention."""
        model, tokens, b, length = self.config.model, self.tokens, self.width, self.config.train.seq_len
        d, heads, kv_heads = model.head_dim, model.heads, model.kv_heads
        operands = (3 * b if b < WIDE else WIDE) * model.width
        each = operands + 2 * WIDE * d + b * d * (3 * heads + 2 * kv_heads)
        if self.cpu and b < WIDE and tokens * heads * length <= EXPLICIT:
            return tokens * (each + heads * length * b)
        return tokens * (each + WIDE * heads) + b * (heads // kv_heads) * length**2

    def feed_forward(self, hidden: int, activation: str = "swiglu") -> int:
        """One dense feed-forward network of that hidden width."""
        return self.tokens * self.width * (self.config.model.width + KEPT[activation] * hidden)

    def sparse(self, moe: MoEConfig) -> int:
        """One MoE layer: router, experts, shared experts."""
        tokens, b, sent, here = self.tokens, self.width, self.sent(moe), self.received(moe)
        kept = KEPT[moe.activation] * moe.expert_width
        each = b * (moe.width + kept) + (moe.expert_width if moe.expert_dropout else 0)
        found = tokens * (WIDE * moe.width + 20 * moe.num_experts + 20 * choices(moe) + 16) + sent * b * moe.width
        found += here * (each + (16 if self.layout.ep > 1 else 0))
        if moe.shared_experts:
            found += self.feed_forward(moe.shared_width or moe.shared_experts * moe.expert_width, moe.activation)
        return found + 2 * b * tokens * moe.width if moe.shared_gate else found

    def sent(self, moe: MoEConfig) -> int:
        """N: kept assignments of this rank's tokens, at most."""
        wanted = self.tokens * choices(moe)
        return min(wanted, self.slots(moe) * moe.num_experts) if self.slots(moe) else wanted

    def received(self, moe: MoEConfig) -> int:
        """N': rows that the experts here compute: as many as are sent when load is even, or all that can come."""
        if not self.collapsed or self.layout.ep == 1:
            return self.sent(moe)
        ep, experts = self.layout.ep, moe.num_experts // self.layout.ep
        most = self.tokens * min(choices(moe), experts)
        return ep * (min(most, self.slots(moe) * experts) if self.slots(moe) else most)

    def slots(self, moe: MoEConfig) -> int:
        """Slots of one expert over this rank's groups (`capacity.py`'s formula); 0 = dropless."""
        if moe.capacity_factor is None or moe.router == "dense":
            return 0
        groups, size = (1, self.tokens) if moe.group == "rank" else (self.rows, self.tokens // self.rows)
        wanted = ceil(Fraction(str(moe.capacity_factor)) * size * moe.top_k / moe.num_experts)
        return groups * min(max(wanted, moe.min_capacity), size)

    @property
    def head(self) -> int:
        """Operand of the head, log-probabilities, token and target ids."""
        model = self.config.model
        return self.tokens * (self.width * model.width + WIDE * model.vocab_size + 16)

    # What comes and goes ----------------------------------------------------------------------------------------------

    @property
    def logits(self) -> int:
        """Beside the log-probabilities: their gradient in float32, and under bfloat16 in that too."""
        return self.tokens * self.config.model.vocab_size * (WIDE + (self.width if self.width < WIDE else 0))

    @property
    def buffers(self) -> int:
        """One layer's rows as they arrive and in the experts' order: one layer travels at a time."""
        moe = self.config.model.moe
        return 2 * self.width * self.received(moe) * moe.width if moe and self.layout.ep > 1 else 0

    @property
    def workspace(self) -> int:
        """Muon's step: about three bfloat16 copies of all matrices of its most common shape. AdamW works in place.

        Adafactor and AdamW in bfloat16 take about three and five float32 copies of the largest tensor.
        """
        optim = self.config.optim
        copies = 3 if optim.name == "adafactor" else 5 if optim.state_dtype == "bfloat16" else 0
        largest = max(prod(shape) for name, shape in self.shapes.items() if not self._muon(name, shape))
        groups: dict[tuple[int, ...], int] = {}
        for name, shape in self.shapes.items():
            if self._muon(name, shape):
                key = (*shape[-2:], name.endswith("w_out"))
                groups[key] = groups.get(key, 0) + prod(shape)
        return max(3 * 2 * max(groups.values(), default=0), copies * WIDE * largest)

    @property
    def total(self) -> int:
        """The peak: what lasts, and the larger of a micro-batch and an optimizer step."""
        micro = self.casts + self.activations + max(self.logits, self.buffers)
        return self.weights + self.gradients + self.optimizer + max(micro, self.workspace)

    @property
    def kv_token(self) -> int:
        """Keys and values of one token in serving, in `train.dtype`: 2 · layers · G · d · b."""
        model = self.config.model
        return 2 * model.layers * model.kv_heads * model.head_dim * self.width

    def _state(self, name: str, shape: tuple[int, ...]) -> int:
        """Bytes of a parameter's optimizer state."""
        optim = self.config.optim
        if optim.name == "adafactor" and len(shape) > 1:
            return WIDE * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])
        if optim.name == "adafactor":
            return WIDE * prod(shape)
        number, counter = (2, 0) if optim.state_dtype == "bfloat16" else (WIDE, WIDE)
        return number * prod(shape) if self._muon(name, shape) else 2 * number * prod(shape) + counter

    def _muon(self, name: str, shape: tuple[int, ...]) -> bool:
        return self.config.optim.name == "muon" and shapes.is_hidden_matrix(name, len(shape))


def choices(moe: MoEConfig) -> int:
    """K of the routing record: under expert choice every expert is a choice of every token."""
    return moe.num_experts if moe.router == "expert_choice" else moe.top_k
