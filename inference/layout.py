"""Which of training's layouts a server can have. No torch here."""

from ..configs.typed import check
from ..parallel.config import ParallelConfig


def check_layout(parallel: ParallelConfig, world: int) -> None:
    """Check that `world` ranks can serve a model so.

    Raises:
        ConfigError: naming the field.
    """
    for name in ("pp", "cp"):
        value = getattr(parallel, name)
        check(value == 1, f"parallel.{name}", value, "divides training's work, not a server's", "use dp, ep or tp")
    rule = "divides what training holds besides weights, and a server has nothing of it"
    check(not parallel.fsdp, "parallel.fsdp", parallel.fsdp, rule, "leave it out")
    check(parallel.zero == 1, "parallel.zero", parallel.zero, rule, "leave it out")
    parallel.resolve(world)
