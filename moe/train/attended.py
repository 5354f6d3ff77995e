"""What one block's attention keeps for backward, in bytes. No torch here.

Letters as in `footprint.py`. Of latent attention: c rank of the latent, c' of the queries', r rotary numbers, d and v
of a head's keys without positions and of its values, all by head once the latents are expanded:

    operands    x into two matrices; the latents' norms, c + c', and what they go into
    products    A (8 r + b H (d + r) + 2 b H v) + W b H (2 d + r + v)    cos and sin; q, o, operand of W_o; what the
                                                                         latents expand to, and k with its rotary part
"""

from ..config import LatentConfig, ModelConfig
from .config import RunConfig
from .held import WIDE

EXPLICIT = 1 << 23  # kernels/torch_ops/attention.py: the most scores that are written out


def attention(config: RunConfig, *, tokens: int, attended: int, read: int, width: int, tp: int, cpu: bool) -> int:
    """Bytes.

    Args:
        config: the run.
        tokens, attended, read: T, A and W.
        width: b.
        tp: ranks that divide the heads.
        cpu: whether attention takes the CPU's form.
    """
    model, length = config.model, config.train.seq_len
    latent, b, d = model.attention.latent, width, model.head_dim
    heads, kv_heads = model.heads // tp, max(model.kv_heads // tp, 1)
    matrices = 3 if latent is None else 2
    copies = b * (1 if cpu and _plain(model) else matrices) if b < WIDE else WIDE  # autocast casts for each matrix anew
    found = tokens * model.width * copies if tp == 1 else attended * b * model.width
    if cpu and config.train.dtype == "bfloat16" and _flash(model):
        return found + attended * (2 * WIDE * d + heads * (2 * b * d + WIDE)) + read * 2 * b * kv_heads * d
    if latent is None:
        found += attended * (2 * WIDE * d + 3 * b * heads * d) + read * 2 * b * kv_heads * d
    else:
        found += _latent(latent, attended, read, b, heads, d)
    if cpu and b < WIDE and attended * heads * length <= EXPLICIT:
        return found + attended * heads * length * b
    return found + attended * WIDE * heads + b * (heads // kv_heads) * length**2


def _plain(model: ModelConfig) -> bool:
    """Whether queries, keys and values are one operation, which casts once."""
    own = model.attention
    return (
        own.latent is None
        and own.positions == "rotary"
        and own.clip is None
        and not own.qkv_bias
        and own.qk_norm != "width"
    )


def _flash(model: ModelConfig) -> bool:
    """Whether the kernel of kernels/cpp/flash.py takes it."""
    own = model.attention
    fits = model.head_dim % 32 == 0 and model.head_dim <= 256
    return fits and own.latent is None and own.positions != "relative" and not own.sinks


def _latent(latent: LatentConfig, attended: int, read: int, b: int, heads: int, d: int) -> int:
    rope, value = latent.rope_dim, latent.value_dim
    normed = sum((2 * WIDE + b) * rank + WIDE for rank in (latent.rank, latent.query_rank) if rank)
    products = 2 * WIDE * rope + b * heads * (d + rope + 2 * value)
    return attended * (normed + products) + read * b * heads * (2 * d + rope + value)
