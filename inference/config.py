"""The serving engine's settings: batch and pool sizes, precision, queue limits."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from ..configs.typed import check

Dtype = Literal["auto", "float32", "bfloat16", "float16", "float64"]
KVDtype = Literal["auto", "int8"]
Kernels = Literal["auto", "reference", "triton", "cpp"]
Batching = Literal["continuous", "static", "dynamic"]
KVLayout = Literal["paged", "contiguous"]
MoECapacity = Literal["dropless", "trained"]


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What the engine and its scheduler are built from.

    Args:
        max_num_seqs: requests that may run at once.
        max_num_batched_tokens: token budget of one step; at least `max_num_seqs`, so that no decode ever starves, and
            more than the longest input of an encoder, which is read in one step.
        block_size: tokens in one block of the KV cache.
        num_blocks: blocks in the pool, the null block included; None = from `kv_memory_mb`.
        max_model_len: longest prompt + completion in tokens; with an encoder the prompt, its input, may be as long as
            well. None = what the model was built for.
        enable_prefix_caching: share the keys and values of equal prefixes between requests.
        dtype: precision of weights and KV cache; "auto" = the checkpoint's.
        kv_dtype: "int8" keeps keys and values as int8 with a float32 scale for each head of each token; "auto" = dtype.
        seed: key of the random numbers of requests that bring no seed of their own.
        kernels: which forms of the operations run: those that are fastest for the arguments at hand, or one kind
            wherever it fits (`kernels.table`); "cpp" on a CPU only, "triton" on a GPU or in its interpreter.
        deterministic: a request's output is the same bits whatever else the engine does; slower, on a CPU only.
        max_waiting: requests that may queue; more are refused (HTTP 429).
        queue_timeout: seconds that a request may wait for its first step before it expires (HTTP 503); None = for ever.
        kv_memory_mb: size of the KV cache in MiB when `num_blocks` is None; None = the engine's default.
        batching: `continuous`: a request starts as soon as there is room; `static`: a batch is admitted whole, and
            nothing else until all of it has ended; `dynamic`: as static, a batch being what arrives within a window.
        batch_window: seconds for which dynamic batching collects requests, counted from the first.
        kv_layout: `paged`, or `contiguous`: every request reserves `max_model_len` tokens, as before PagedAttention.
        overlap: plan a step and hand out the last one's tokens while the next one is computed, in a thread of its own;
            None = where the model is on a GPU.
        moe_capacity: "dropless", or "trained": experts drop what they drop in the trainer's evaluation, each request
            being a group of its own, whatever runs beside it.
        semi_structured: multiply matrices of two numbers in every four (`pattern=2:4` of `turnout compress`) without
            their zeros, by a GPU's sparse tensor cores; not those of experts.
        grammar_timeout: seconds that compiling one request's grammar may take.
        graph_buckets: numbers of requests, ascending, in whose shapes decode steps run; none = as they come.
        watchdog_seconds: how long a step may take before the engine counts as stalled: all stacks go to stderr and
            every request fails.

    Raises:
        ConfigError: a value out of range.
    """

    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    block_size: int = 16
    num_blocks: int | None = None
    max_model_len: int | None = None
    enable_prefix_caching: bool = True
    dtype: Dtype = "auto"
    kv_dtype: KVDtype = "auto"
    seed: int = 0
    kernels: Kernels = "auto"
    deterministic: bool = False
    max_waiting: int = 1024
    queue_timeout: float | None = None
    kv_memory_mb: int | None = None
    batching: Batching = "continuous"
    batch_window: float = 0.05
    kv_layout: KVLayout = "paged"
    overlap: bool | None = None
    moe_capacity: MoECapacity = "dropless"
    semi_structured: bool = False
    grammar_timeout: float = 5.0
    graph_buckets: tuple[int, ...] = ()
    watchdog_seconds: float = 120.0

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "block_size", "max_model_len", "max_waiting", "kv_memory_mb"):
            value = getattr(self, name)
            check(value is None or value >= 1, name, value, "must be at least 1", "use a positive number")
        check(
            self.max_num_batched_tokens >= self.max_num_seqs,
            "max_num_batched_tokens",
            self.max_num_batched_tokens,
            f"must be at least max_num_seqs ({self.max_num_seqs})",
            "raise it or lower max_num_seqs",
        )
        check(
            self.num_blocks is None or self.num_blocks >= 2,
            "num_blocks",
            self.num_blocks,
            "must leave a usable block beside the null block",
            "use at least 2",
        )
        check(
            self.queue_timeout is None or self.queue_timeout > 0,
            "queue_timeout",
            self.queue_timeout,
            "must be positive",
            "use seconds, or null to wait for ever",
        )
        check(
            0 <= self.batch_window < 3600,
            "batch_window",
            self.batch_window,
            "must be seconds, from 0 to 3600",
            "use a fraction of a second",
        )
        check(
            0 < self.grammar_timeout < 3600,
            "grammar_timeout",
            self.grammar_timeout,
            "must be seconds, above 0 and below 3600",
            "use a few seconds",
        )
        check(
            self.watchdog_seconds > 0,
            "watchdog_seconds",
            self.watchdog_seconds,
            "must be positive",
            "use seconds, more than the longest step takes",
        )
        self._check_choices()
        check(0 <= self.seed < 2**64, "seed", self.seed, "must fit 64 bits", "use 0 to 2**64 - 1")
        check(
            all(low < high for low, high in pairwise((0, *self.graph_buckets))),
            "graph_buckets",
            ", ".join(map(str, self.graph_buckets)),
            "must be positive and ascend",
            "use numbers of requests such as 1, 2, 4, 8",
        )

    def _check_choices(self) -> None:
        """What is one of a few words, or excludes another."""
        choices = {
            "batching": Batching, "kv_layout": KVLayout, "kv_dtype": KVDtype, "kernels": Kernels,
            "moe_capacity": MoECapacity,
        }  # fmt: skip
        for name, values in ((name, get_args(choice)) for name, choice in choices.items()):
            value = getattr(self, name)
            check(value in values, name, value, "must be one of those known", f"use {', '.join(values)}")
        check(
            self.kernels == "auto" or not self.deterministic,
            "kernels",
            self.kernels,
            "must be auto with deterministic=true, which takes the forms that are batch-invariant",
            "leave one of them out",
        )
        rule = "must be empty with semi_structured=true, whose kernels nobody has seen in a CUDA graph"
        fits = not (self.semi_structured and self.graph_buckets)
        check(fits, "graph_buckets", ", ".join(map(str, self.graph_buckets)), rule, "leave one of them out")

    @property
    def form(self) -> str | None:
        """What `kernels.using` is to prefer; None = what it finds best."""
        if self.deterministic:
            return "invariant"
        return None if self.kernels == "auto" else self.kernels
