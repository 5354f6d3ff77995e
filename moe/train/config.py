"""What a training run is: one frozen tree of dataclasses, validated as a whole at birth. No torch here.

`RunConfig` is what the launcher freezes into `runs/<id>/config.yaml` and what every rank reads.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

from ...configs.typed import check, check_choices
from ...parallel.config import Layout, ParallelConfig
from ..config import ModelConfig
from ..data.config import DataConfig
from ..upcycle_config import UpcycleConfig
from .distill_config import DistillConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer and its learning-rate schedule.

    Args:
        name: `adamw` or `adafactor` for everything, or `muon` for hidden matrices with AdamW for the rest.
        lr: AdamW's or Adafactor's peak learning rate.
        muon_lr: Muon's peak learning rate, for matrices.
        momentum: Muon's Nesterov momentum.
        beta1: AdamW's decay of the mean.
        beta2: AdamW's decay of the square.
        eps: AdamW's epsilon.
        weight_decay: decoupled decay of matrices, embeddings and heads (vectors and routers do not decay).
        warmup: share of the run, in [0, 1), over which the rate rises linearly.
        final: share of the peak at which the schedule ends (`constant` never leaves the peak).
        clip: global gradient norm above which gradients are scaled down; null = never.
        state_dtype: in which AdamW's and Muon's moments are held, on the device and in checkpoints.
        schedule: how the rate falls behind the warm-up: `cosine`, `linear`, `constant`, or `wsd`, which stays at the
            peak and cools down at the end (warm-up, stable, decay).
        decay: share of the run, its last, in which `wsd` cools down.
    """

    name: Literal["adamw", "muon", "adafactor"] = "adamw"
    lr: float = 1e-3
    muon_lr: float = 0.02
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup: float = 0.02
    final: float = 0.0
    clip: float | None = 1.0
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    decay: float = 0.2

    def __post_init__(self) -> None:
        check_choices(self, "optim")
        for name in ("lr", "muon_lr", "eps"):
            _positive(f"optim.{name}", getattr(self, name))
        for name in ("momentum", "beta1", "beta2", "warmup"):
            value = getattr(self, name)
            check(0 <= value < 1, f"optim.{name}", value, "must lie in [0, 1)", "choose a share below 1")
        check(0 <= self.final <= 1, "optim.final", self.final, "must lie in [0, 1]", "use 0 to decay to zero")
        room = round(1 - self.warmup, 12)  # 1 - 0.9 is a little less than 0.1
        rule, fix = f"must lie above 0 and within what optim.warmup leaves ({room:g})", "use 0.2"
        check(0 < self.decay <= room or self.schedule != "wsd", "optim.decay", self.decay, rule, fix)
        value = self.weight_decay
        check(0 <= value < 1, "optim.weight_decay", value, "must lie in [0, 1)", "use 0.1, or 0 for none")
        if self.clip is not None:
            _positive("optim.clip", self.clip, "use 1.0, or null to never clip")
        rule = "is not built for optim.name=adafactor, whose states are a row and a column a matrix"
        fits = self.name != "adafactor" or self.state_dtype == "float32"
        check(fits, "optim.state_dtype", self.state_dtype, rule, "leave it at float32")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long a run is, how large its steps are, and what it keeps.

    Args:
        steps: optimizer steps of the run; null = train by `seconds`.
        seconds: length of the run on rank 0's clock; null = train by `steps`.
        global_batch: rows of one optimizer step, over all ranks.
        micro_batch: rows of one forward pass of one rank; null = all of the rank's rows at once.
        seq_len: tokens of a row.
        eval_every: steps between evaluations on held-out text; null = only at the end.
        eval_split: which text the run's evaluations read: the held-out one, or what `data.tuning` keeps from training.
        eval_bytes: how much held-out text an evaluation within the run reads; null = all of it.
        save_every: steps between checkpoints; null = only at the end.
        keep: newest checkpoints kept.
        async_save: write checkpoints behind the steps, from a copy in host memory, and commit each at a later step.
        save_failures: saves in a row that may fail before the run stops.
        dtype: of the forward pass under autocast (parameters and optimizer stay float32, the router too); float16
            scales the loss.
        recompute: activations that the backward pass computes again instead of keeping them: `none`; `selective`, the
            inside of feed-forward networks and experts; `full`, all of every block but its input.
        compile: compile the blocks' training pass with torch.compile; attention, routing and experts stay as they are.
        init: a run, model or Hugging Face directory: the run starts from its weights, with its architecture and
            tokenizer (`launch/follow.py`), made sparse where `upcycle` says so.
        keep_zeros: what is zero in the blocks' matrices of `init` stays zero, so that a pruned model stays one.
        distill: who teaches the run beside its text, and how; null = nobody.
        resume: true = go on from the run's newest checkpoint if there is one; or a run or checkpoint directory.
        profile: steps that a profiler records after a short warm-up, into `profile/` of the run; null = none.
        spike: a step whose loss exceeds this many times the median of the last steps rewinds the run; null = never.
        rewinds: how often a run rewinds before a spike stops it.
        skip_nonfinite: steps in a row that may be not finite and are skipped before the run stops.
    """

    steps: int | None = 1000
    seconds: float | None = None
    global_batch: int = 8
    micro_batch: int | None = None
    seq_len: int = 256
    eval_every: int | None = None
    eval_split: Literal["validation", "tuning"] = "validation"
    eval_bytes: int | None = 200_000
    save_every: int | None = 500
    keep: int = 2
    async_save: bool = False
    save_failures: int = 0
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    recompute: Literal["none", "selective", "full"] = "none"
    compile: bool = False
    init: str | None = None
    keep_zeros: bool = False
    distill: DistillConfig | None = None
    resume: bool | str = False
    profile: int | None = None
    spike: float | None = None
    rewinds: int = 3
    skip_nonfinite: int = 0

    def __post_init__(self) -> None:
        check_choices(self, "train")
        rule = f"and train.seconds ({self.seconds}) are two ways to end a run and exactly one must be set"
        fix = "make one of them null, as in train.steps=1000 train.seconds=null"
        check((self.steps is None) != (self.seconds is None), "train.steps", self.steps, rule, fix)
        for name in ("steps", "micro_batch", "eval_every", "eval_bytes", "save_every", "profile"):
            if getattr(self, name) is not None:
                _at_least_one(f"train.{name}", getattr(self, name))
        for name in ("global_batch", "keep"):
            _at_least_one(f"train.{name}", getattr(self, name))
        check(self.seq_len >= 2, "train.seq_len", self.seq_len, "must be at least 2", "use 256")
        if self.seconds is not None:
            _positive("train.seconds", self.seconds, "use 180")
        if self.init is not None and isinstance(self.resume, str):
            rule = f"can not be combined with train.resume ({self.resume})"
            check(False, "train.init", self.init, rule, "a run starts from one place: keep one, or train.resume=true")
        rule = "keeps what pruning made zero, and train.init (null) names no pruned model"
        check(self.init is not None or not self.keep_zeros, "train.keep_zeros", True, rule, "use train.init=DIR")
        for name in ("rewinds", "skip_nonfinite", "save_failures"):
            value = getattr(self, name)
            check(value >= 0, f"train.{name}", value, "must not be negative", "use 0 or more")
        rule, fix = "must be above 1 and finite", "use 2, or null to never rewind"
        check(self.spike is None or 1 < self.spike < float("inf"), "train.spike", self.spike, rule, fix)
        check(self.resume != "", "train.resume", repr(self.resume), "must be true, false or a directory", "name a run")


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What a run tells.

    Args:
        every: steps between rows of `metrics.jsonl` and progress lines.
        wandb: also log to Weights & Biases: online with a key, offline without one.
        project: its project there.
        tensorboard: also log to TensorBoard, in `tensorboard/` of the run.
        alarm: evenness of a MoE layer's load (0 = collapsed, 1 = even) below which the run tells; null = never.
    """

    every: int = 10
    wandb: bool = False
    project: str = "turnout"
    tensorboard: bool = False
    alarm: float | None = 0.1

    def __post_init__(self) -> None:
        _at_least_one("log.every", self.every)
        check(bool(self.project), "log.project", repr(self.project), "must not be empty", "use log.project=turnout")
        rule, fix = "must lie between 0 and 1", "use 0.1, or null for no alarm"
        check(self.alarm is None or 0 < self.alarm < 1, "log.alarm", self.alarm, rule, fix)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that a training run computes from. `model.moe` holds the `moe` group.

    Args:
        kernels: which form of the operations to prefer, as in `kernels.using`; `auto` takes what is fastest and fits.
        trace: write every decision of the routers under `routing/` of the run; on the command line `moe.trace`.
        replay: take the routers' decisions from this run or `routing/` directory; on the command line `moe.replay`.
    """

    model: ModelConfig
    data: DataConfig
    seed: int = 0
    engine: Literal["native", "deepspeed"] = "native"
    kernels: Literal["auto", "reference", "torch", "triton", "cpp"] = "auto"
    trace: bool = False
    replay: str | None = None
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    upcycle: UpcycleConfig = field(default_factory=UpcycleConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    log: LogConfig = field(default_factory=LogConfig)

    def __post_init__(self) -> None:
        check_choices(self, "")
        check(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2**63)", "use seed=0")
        model, seq_len = self.model, self.train.seq_len
        rule = f"must equal data.vocab_size ({self.data.vocab_size})"
        fits = model.vocab_size == self.data.vocab_size
        check(fits, "model.vocab_size", model.vocab_size, rule, "leave it to follow data.vocab_size")
        rule = f"can not exceed model.max_seq_len ({model.max_seq_len})"
        check(seq_len <= model.max_seq_len, "train.seq_len", seq_len, rule, "shorten rows or raise model.max_seq_len")
        if model.moe is not None:
            tokens = model.moe.capacity_tokens
            rule = f"must equal train.seq_len ({seq_len}), the group whose capacity is shared in training"
            check(tokens in (None, seq_len), "moe.capacity_tokens", tokens, rule, "leave it to follow train.seq_len")
        rule = "is how a compressed model is stored, and training changes whole weights"
        check(model.quantization is None, "model.quantization", "set", rule, "train the model it was made of")
        experts, fits = self.upcycle.num_experts, self.upcycle.num_experts is None or self.train.init is not None
        rule = "makes a checkpoint sparse, and train.init (null) names none"
        check(fits, "upcycle.num_experts", experts, rule, "use train.init=DIR, or upcycle.num_experts=null")
        timed = [source for source in self.data.mix or () if (source.since, source.until) != (0, 1)]
        rule = "has sources for a part of the run, which is measured in steps"
        fits = not timed or self.train.steps is not None
        check(fits, "data.mix", f"{len(timed)} of them", rule, "use train.steps=1000 train.seconds=null")
        rule, split = "is a share of the training documents, and data.tuning (None) keeps none", self.train.eval_split
        fits = split != "tuning" or self.data.tuning is not None
        check(fits, "train.eval_split", split, rule, "use data.tuning=0.05")
        for name in ("trace", "replay"):
            value, rule = getattr(self, name), "needs routers, which a dense model does not have"
            check(model.moe is not None or not value, f"moe.{name}", value, rule, "leave it out")
        check(self.replay != "", "moe.replay", repr(self.replay), "must name a directory", "use moe.replay=runs/NAME")
        if self.parallel.fsdp:
            rule = "is not for engine=deepspeed, which has ZeRO for it"
            check(self.engine == "native", "parallel.fsdp", True, rule, "use engine=native, or parallel.zero")
            rule = "can not divide matrices that tensor parallelism divides already"
            check(self.parallel.tp == 1, "parallel.fsdp", True, rule, "use parallel.tp=1, or parallel.fsdp=false")
        rule = "is read by engine=deepspeed only"
        stage, fits = self.parallel.zero, self.engine == "deepspeed" or self.parallel.zero == 1
        check(fits, "parallel.zero", stage, rule, "use engine=deepspeed, or leave it out")
        if stage == 3:
            ep = self.parallel.ep
            rule = "gives ranks experts of their own, and parallel.zero=3 cuts what all ranks hold"
            check(ep == 1, "parallel.ep", ep, rule, "use parallel.zero=2, or engine=native parallel.fsdp=true")
            rule = "is not built for parallel.zero=3, whose parameters come and go"
            check(not self.train.compile, "train.compile", True, rule, "use train.compile=false, or parallel.zero=2")
        self._check_pipeline()
        self._check_encoder()
        self._check_distill()
        if self.engine == "deepspeed":
            rule = "is not built for engine=deepspeed (ZeRO shards flat AdamW states)"
            check(self.optim.name == "adamw", "optim.name", self.optim.name, rule, "use optim=adamw")
            rule = "is not built for engine=deepspeed (ZeRO holds its states in float32)"
            dtype = self.optim.state_dtype
            check(dtype == "float32", "optim.state_dtype", dtype, rule, "use optim.state_dtype=float32")
            rule = "is not built for engine=deepspeed (the loss is scaled by our engine, not by ZeRO's)"
            check(self.train.dtype != "float16", "train.dtype", self.train.dtype, rule, "use train.dtype=bfloat16")
            rule = "is not built for engine=deepspeed"
            check(not self.train.keep_zeros, "train.keep_zeros", True, rule, "use engine=native")
            for name in ("cp", "tp"):
                size = getattr(self.parallel, name)
                check(size == 1, f"parallel.{name}", size, rule, "use engine=native")

    def _check_pipeline(self) -> None:
        parallel, layers = self.parallel, self.model.layers
        if parallel.pp == 1:
            return
        rule = "sums its own gradients and is built for engine=native"
        check(self.engine == "native", "parallel.pp", parallel.pp, rule, "use engine=native, or parallel.pp=1")
        rule = "holds parameters whole while micro-batches are under way, which parallel.fsdp spreads"
        check(not parallel.fsdp, "parallel.pp", parallel.pp, rule, "use parallel.fsdp=false, or parallel.pp=1")
        rule = f"times parallel.virtual ({parallel.virtual}) can not exceed model.layers ({layers})"
        fits = parallel.pp * parallel.virtual <= layers
        check(fits, "parallel.pp", parallel.pp, rule, "use fewer, or a deeper model")

    def _check_encoder(self) -> None:
        """An encoder and the rows for it belong together; some of what trains a decoder is not built for both."""
        spans, row = self.data.spans, self.train.seq_len
        if self.model.encoder is None:
            rule = "is what an encoder-decoder learns from, and model.encoder is null"
            check(spans is None, "data.spans", "set", rule, "use data.spans=null, or model.encoder={layers: 4}")
            return
        rule = "needs data.spans, from which an encoder-decoder learns"
        check(spans is not None, "model.encoder", "set", rule, "use data.spans={}, or model.encoder=null")
        assert spans is not None
        spans.check_row(row)
        longest = max(spans.source(row), spans.target(row))
        rule = f"makes {longest} tokens of a row's source or target, and model.max_seq_len is {self.model.max_seq_len}"
        check(longest <= self.model.max_seq_len, "train.seq_len", row, rule, "shorten rows or raise model.max_seq_len")
        rule = "is not built for an encoder-decoder"
        for name in ("pp", "cp", "tp"):
            size = getattr(self.parallel, name)
            check(
                size == 1, f"parallel.{name}", size, f"{rule}, whose two stacks it would divide apart", "use dp and ep"
            )
        check(self.engine == "native", "engine", self.engine, rule, "use engine=native")
        check(not self.train.compile, "train.compile", True, rule, "use train.compile=false")
        for name in ("trace", "replay"):
            value = getattr(self, name)
            check(not value, f"moe.{name}", value, f"{rule}: a trace is of one row of tokens", "leave it out")

    def _check_distill(self) -> None:
        """What a teacher can not be beside; what it must be itself is known when it is loaded."""
        how = self.train.distill
        if how is None:
            return
        rule, name = "is not built for", "train.distill"
        fix = "use model.encoder=null, or train.distill=null"
        check(self.model.encoder is None, name, how.teacher, f"{rule} an encoder-decoder", fix)
        rule = "is not built for parallel.zero=3, whose head is gone when its backward pass asks again"
        check(self.parallel.zero < 3, name, how.teacher, rule, "use parallel.zero=2, or parallel.fsdp=true")
        rule = f"compares blocks on ranks of a pipeline (parallel.pp={self.parallel.pp}) with a teacher on the last"
        fits = self.parallel.pp == 1 or not how.hidden
        check(fits, "train.distill.hidden", how.hidden, rule, "use train.distill.hidden=0, or parallel.pp=1")
        how.check_on_policy(self.engine, self.parallel, self.train.global_batch, self.train.seq_len)

    def layout(self, world: int) -> Layout:
        """How `world` ranks share the run.

        Raises:
            ConfigError: the mesh does not fit the ranks, or the batch does not divide over them.
        """
        layout = self.parallel.resolve(world, self.model.moe.num_experts if self.model.moe else None)
        self.model.check_parts(layout.tp)
        rule = "needs at least 2 ranks"
        check(self.engine == "native" or world > 1, "engine", self.engine, rule, "use engine=native, or nproc=2")
        rows, micro, dp = self.train.global_batch, self.train.micro_batch, layout.dp
        rule = f"must be a multiple of the {dp} data-parallel ranks"
        check(rows % dp == 0, "train.global_batch", rows, rule, f"use {max(rows // dp, 1) * dp}")
        rule = f"must divide the {rows // dp} rows of a rank (train.global_batch / {dp})"
        divides = micro is None or (rows // dp) % micro == 0
        check(divides, "train.micro_batch", micro, rule, "use a divisor, or null for no accumulation")
        seq_len, each, pieces = self.train.seq_len, micro or rows // dp, layout.pieces
        rule = f"times the {each} rows of a micro-batch must be a multiple of the {pieces} pieces in which parallel.cp "
        rule += f"({layout.cp}) and parallel.tp ({layout.tp}) divide its tokens"
        check(seq_len * each % pieces == 0, "train.seq_len", seq_len, rule, f"use {-(-seq_len // pieces) * pieces}")
        self._check_micro_batches(layout)
        rule = f"may make more rounds on some of the {layout.edp} ranks among which parallel.fsdp divides an expert"
        limit, fits = self.parallel.exchange_rows, layout.edp == 1 or not self.parallel.fsdp
        check(limit is None or fits, "parallel.exchange_rows", limit, rule, "use null, or parallel.fsdp=false")
        rule = f"must be a multiple of the {layout.stage} ranks over which parallel.fsdp cuts a dense SwiGLU's columns"
        cuts = self.parallel.fsdp and len(self.model.moe_layers) < self.model.layers
        width, ranks = self.model.width, layout.stage
        check(not cuts or width % ranks == 0, "model.width", width, rule, f"use {-(-width // ranks) * ranks}")
        return layout

    def _check_micro_batches(self, layout: Layout) -> None:
        """A pipeline needs a micro-batch for each of its ranks, an interleaved one a multiple of that."""
        pp, rows, micro = layout.pp, self.train.global_batch // layout.dp, self.train.micro_batch
        interleaved = self.parallel.virtual > 1

        def fits(count: int) -> bool:
            return count % pp == 0 if interleaved else count >= pp

        best = max((size for size in range(1, rows + 1) if rows % size == 0 and fits(rows // size)), default=None)
        need = f"a multiple of parallel.pp ({pp})" if interleaved else f"at least parallel.pp ({pp})"
        rule = f"cuts a rank's {rows} rows into {rows // (micro or rows)}, and a pipeline needs {need} micro-batches"
        fix = f"use train.micro_batch={best}" if best else f"use train.global_batch={layout.dp * pp} or a multiple"
        check(pp == 1 or fits(rows // (micro or rows)), "train.micro_batch", micro, rule, fix)

    @property
    def row(self) -> tuple[int, int]:
        """Targets of a row, and tokens of it that an encoder reads."""
        length, spans = self.train.seq_len, self.data.spans
        return (length, 0) if spans is None else (spans.target(length), spans.source(length))

    def micro_batches(self, dp: int) -> int:
        """Forward passes of one rank in one optimizer step."""
        rows = self.train.global_batch // dp
        return rows // (self.train.micro_batch or rows)


# What a run must share with a checkpoint to go on from it: what the parameters are and what they have seen.
IDENTITY = ("model", "data", "seed", "optim.name", "train.global_batch", "train.seq_len")


def identity(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's plain configuration (`to_dict`) that its checkpoints depend on, flat: dotted key → value."""
    flat = flatten(config)
    timed = any((source["since"], source["until"]) != (0, 1) for source in config["data"].get("mix") or ())
    names = (*IDENTITY, "train.steps") if timed else IDENTITY  # which a source's time is a share of
    names = (*names, "train.keep_zeros") if config["train"].get("keep_zeros") else names
    return {key: value for key, value in flat.items() if any(f"{key}.".startswith(f"{name}.") for name in names)}


def flatten(tree: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Nested mappings as one: dotted key → value."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat.update(flatten(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value})
    return flat


def _at_least_one(name: str, value: int) -> None:
    check(value >= 1, name, value, "must be at least 1", f"use {name}=1 or more")


def _positive(name: str, value: float, fix: str = "use a small positive number") -> None:
    check(0 < value < float("inf"), name, value, "must be positive and finite", fix)
