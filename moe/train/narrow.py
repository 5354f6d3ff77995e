"""Whether a rank's gradients of experts are held in bfloat16. No torch here.

They are products in that type: where nothing is added to them, not by another micro-batch, another part of the tokens
or another rank, float32 would hold the same numbers in twice the memory.
"""

from ...parallel.config import Layout
from .config import RunConfig


def narrow_gradients(config: RunConfig, layout: Layout) -> bool:
    """Of a rank whose device is a CPU."""
    moe, parallel, train, optim = config.model.moe, config.parallel, config.train, config.optim
    if moe is None or moe.activation != "swiglu" or moe.bias or moe.expert_dropout:
        return False
    product = train.dtype == "bfloat16" and config.kernels in ("auto", "torch") and not train.compile
    alone = config.micro_batches(layout.dp) == layout.edp == layout.pp == parallel.chunks == 1
    alone = alone and parallel.exchange_rows is None and config.engine == "native" and not parallel.fsdp
    return product and alone and optim.name == "adamw" and optim.state_dtype == "float32"
