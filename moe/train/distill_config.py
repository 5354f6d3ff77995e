"""How a run learns from a teacher: a frozen dataclass, validated at birth. No torch here."""

from dataclasses import dataclass
from typing import Literal

from ...configs.typed import check, check_choices
from ...parallel.config import ParallelConfig

WRITTEN = "on_policy_loss"  # is a mean over what the student has written; all else over the text


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Knowledge distillation (Hinton et al. 1503.02531), mixed as Switch Transformers do (2101.03961 §4.2).

    A token's loss is (1 - soft) · cross entropy + soft · τ² · KL(teacher ‖ student at τ) + hidden · distance of states.

    Args:
        teacher: a run, model or Hugging Face directory or GGUF file, of the run's own tokenizer; whole on every rank.
        temperature: τ, which divides both models' logits before the softmax.
        soft: share of the teacher's distribution in the loss, in (0, 1]; the text's next token has the rest.
        hidden: weight of the distance between hidden states behind the blocks (DistilBERT 1910.01108 §3); 0 = none. A
            student of another width learns a matrix that brings its states there (TinyBERT 1909.10351, eq. 8).
        distance: of two states: `cosine`, 1 - cos, or `mse`, the mean square over the width.
        layers: for each of the student's blocks the teacher's that it is held against; null = evenly, last to last.
        stop: share of the run behind which the text alone teaches (DeepSpeed-MoE 2201.05596 §4.2: a small student has
            no room for both to the end); 1 = never.
        on_policy: share of a step's rows that the student itself writes (GKD, 2306.13649), in whose loss is the
            teacher's divergence alone, with its whole weight; 0 = none.
        on_policy_prompt: tokens at the beginning of such a row that stay the text's, and have no loss.
    """

    teacher: str
    temperature: float = 1.0
    soft: float = 0.25
    hidden: float = 0.0
    distance: Literal["cosine", "mse"] = "cosine"
    layers: tuple[int, ...] | None = None
    stop: float = 1.0
    on_policy: float = 0.0
    on_policy_prompt: int = 16

    def __post_init__(self) -> None:
        check_choices(self, "train.distill")
        rule, fix = "must name a model", "use train.distill.teacher=runs/NAME, or train.distill=null"
        check(bool(self.teacher), "train.distill.teacher", repr(self.teacher), rule, fix)
        tau = self.temperature
        check(0 < tau < float("inf"), "train.distill.temperature", tau, "must be positive and finite", "use 1.0 or 2.0")
        for name in ("soft", "stop"):
            value = getattr(self, name)
            check(0 < value <= 1, f"train.distill.{name}", value, "must lie above 0 and up to 1", "use a share")
        rule = "must not be negative nor infinite"
        check(0 <= self.hidden < float("inf"), "train.distill.hidden", self.hidden, rule, "use 1.0, or 0 for none")
        rule = "says which hidden states are compared, and train.distill.hidden is 0"
        fits = self.layers is None or self.hidden > 0
        check(fits, "train.distill.layers", self.layers, rule, "use train.distill.hidden=1.0, or leave it out")
        rule, fix = "must lie in [0, 1)", "use 0.5, or 0 for none"
        check(0 <= self.on_policy < 1, "train.distill.on_policy", self.on_policy, rule, fix)
        name, prompt = "train.distill.on_policy_prompt", self.on_policy_prompt
        check(prompt >= 1, name, prompt, "must be at least 1", "use 16")

    def check_on_policy(self, engine: str, parallel: ParallelConfig, global_batch: int, seq_len: int) -> None:
        """Whether a student can write rows of its own in such a run.

        Raises:
            ConfigError: it can not.
        """
        if not self.on_policy:
            return
        rule = "is not built for train.distill.on_policy, for which every rank writes by itself with the whole model"
        fix = "or train.distill.on_policy=0"
        check(engine == "native", "engine", engine, rule, f"use engine=native, {fix}")
        for name in ("ep", "tp", "pp", "cp"):
            size = getattr(parallel, name)
            check(size == 1, f"parallel.{name}", size, rule, f"use parallel.{name}=1 (dp has the ranks), {fix}")
        check(not parallel.fsdp, "parallel.fsdp", True, rule, f"use parallel.fsdp=false, {fix}")
        rule = f"must leave the text a row of each step's {global_batch} (train.global_batch)"
        most = 1 - 1 / global_batch
        check(self.on_policy <= most, "train.distill.on_policy", self.on_policy, rule, f"use {most:.4g} or less")
        name, rule = "train.distill.on_policy_prompt", f"must leave room in a row of {seq_len} tokens (train.seq_len)"
        check(self.on_policy_prompt < seq_len, name, self.on_policy_prompt, rule, f"use {seq_len // 2}")

    def written(self, global_batch: int) -> float:
        """Rows of a step's `global_batch` that the student writes, in the mean over the steps."""
        return round(self.on_policy * global_batch, 9)  # 0.29 · 100 is a little less than 29

    def pairs(self, student: int, teacher: int) -> dict[int, int]:
        """The student's block → the teacher's, of models of so many blocks.

        Raises:
            ConfigError: `layers` has not one of the teacher's for each of the student's.
        """
        if self.layers is None:
            return {layer: -(-(layer + 1) * teacher // student) - 1 for layer in range(student)}
        rule = f"must name one of the teacher's blocks (0 to {teacher - 1}) for each of the student's {student}"
        fits = len(self.layers) == student and all(0 <= layer < teacher for layer in self.layers)
        check(fits, "train.distill.layers", list(self.layers), rule, "use null for an even choice")
        return dict(enumerate(self.layers))

    @property
    def losses(self) -> tuple[str, ...]:
        """Names of what is measured beside the cross entropy, as `metrics.jsonl` has them."""
        hidden, own = ("hidden_loss",) if self.hidden else (), (WRITTEN,) if self.on_policy else ()
        return ("distill_loss", *hidden, *own)
