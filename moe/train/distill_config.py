"""How a run learns from a teacher: a frozen dataclass, validated at birth. No torch here."""

from dataclasses import dataclass
from typing import Literal

from ...configs.typed import check, check_choices


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Knowledge distillation (Hinton et al. 1503.02531), mixed as Switch Transformers do (2101.03961 §4.2).

    A token's loss is (1 - soft) · cross entropy + soft · τ² · KL(teacher ‖ student at τ) + hidden · distance of states.

    Args:
        teacher: a run, model or Hugging Face directory or GGUF file, of the run's own tokenizer; whole on every rank.
        temperature: τ, which divides both models' logits before the softmax.
        soft: share of the teacher's distribution in the loss, in (0, 1]; the text's next token has the rest.
        hidden: weight of the distance between hidden states behind the blocks (DistilBERT 1910.01108 §3); 0 = none.
        distance: of two states: `cosine`, 1 - cos, or `mse`, the mean square over the width.
        layers: for each of the student's blocks the teacher's that it is held against; null = evenly, last to last.
        stop: share of the run behind which the text alone teaches (DeepSpeed-MoE 2201.05596 §4.2: a small student has
            no room for both to the end); 1 = never.
    """

    teacher: str
    temperature: float = 1.0
    soft: float = 0.25
    hidden: float = 0.0
    distance: Literal["cosine", "mse"] = "cosine"
    layers: tuple[int, ...] | None = None
    stop: float = 1.0

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
        return ("distill_loss", "hidden_loss") if self.hidden else ("distill_loss",)
