"""Distillation: a frozen teacher, whole on every rank that has the head, says what each next token might be.

    teacher = Teacher(config, student, tokenizer, mesh)   # once
    teacher.teach(part, batch)                            # before a micro-batch's forward pass, which returns losses_TP

The student's forward pass ends with `Lesson`: the teacher reads the same tokens as a server would (evaluation mode, no
expert's capacity, its own groups), and both heads are multiplied in chunks of rows, so that no [T, V] logits exist.
Every loss is a number a token, so sums over the global batch do not depend on the layout.

T tokens held here, n of a chunk, W of the whole micro-batch, D student's width, C teacher's, V vocabulary, P losses.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from torch.utils.checkpoint import checkpoint

from ... import ConfigError
from ...configs.typed import check
from ...kernels import cross_entropy
from ...kernels.reference.precision import wide
from ...parallel.mesh import Mesh
from ...parallel.spread import Spread
from ..data.rows import Batch
from ..data.tokenizer import Tokenizer
from ..layers.context import Outlet
from ..models.context import VarlenContext
from ..models.decoder import Decoder
from ..models.store import TOKENIZER, load_config, load_model, tokenizer_directory
from .config import RunConfig
from .distill_config import DistillConfig
from .part import Part, part_of

LOGITS = 1 << 22  # of one model, that exist at once
FEWEST = 128  # rows of a chunk
PROJECTION = "projection"  # of a student of another width than its teacher
LENT = (f"{PROJECTION}.weight",)  # [C, D]: what a student has only while it learns


class Teacher:
    """The model that a run learns from, and how.

    Args:
        config: a run with `train.distill`.
        student: this rank's part of the run's model; its blocks get hooks when hidden states are compared.
        tokenizer: the run's.
        mesh: where this rank stands. The teacher is loaded whole wherever the student's head is.

    Attributes:
        weights_P: of the losses in a token's loss: cross entropy, the teacher's, distance of hidden states, and the
            teacher's about what the student has written.
        project: brings the student's hidden states to the teacher's width.

    Raises:
        ConfigError: the teacher has another vocabulary, tokenizer or form. CheckpointError: it does not read.
    """

    def __init__(self, config: RunConfig, student: Decoder, tokenizer: Tokenizer, mesh: Mesh) -> None:
        assert config.train.distill is not None
        self.config, self.mesh = config.train.distill, mesh
        how = self.config
        weights = [1 - how.soft, how.soft * how.temperature**2, *([how.hidden] if how.hidden else [])]
        weights += [how.temperature**2] if how.on_policy else []
        self.weights_P = torch.tensor(weights, device=mesh.device, dtype=torch.float64)
        self.project = dict(student.named_children()).get(PROJECTION, nn.Identity())
        self.model: Decoder | None = None
        self.pairs: Mapping[int, int] = {}
        if mesh.place["pp"] < mesh.layout.pp - 1:
            return
        self.model = load_model(how.teacher, config.train.dtype, mesh.device)
        check_teacher(config, self.model, tokenizer)
        if how.hidden:
            self.pairs = how.pairs(student.cfg.layers, self.model.cfg.layers)
            _watch(student, self.pairs.keys())
            _watch(self.model, self.pairs.values())

    @property
    def here(self) -> Decoder:
        """The model; ranks without the head do not ask."""
        assert self.model is not None, "a rank without the head teaches nothing"
        return self.model

    def teach(self, part: Part, batch: Batch) -> None:
        """Have the forward pass of `part` return losses_TP in place of losses_T."""
        part.ctx.states = {}
        part.ctx.loss = Lesson(self, batch, part.targets_T, part.ctx.states, part.ctx.spread)

    def mix(self, losses_P: Tensor) -> Tensor:
        """The loss, of the sums (or means) of its parts."""
        return (losses_P * self.weights_P.to(losses_P)).sum()


@dataclass(frozen=True)
class Lesson:
    """What ends the forward pass of one micro-batch. It holds nothing that holds it: a step's routings go with it.

    Attributes:
        batch: of the data-parallel rank.
        targets_T: of the tokens held here.
        states: block → what the student's has returned, where that is wanted.
        spread: which tokens are held here; None = all.
    """

    teacher: Teacher
    batch: Batch
    targets_T: Tensor
    states: dict[int, Tensor]
    spread: Spread | None

    def __call__(self, x_TD: Tensor, outlet: Outlet) -> Tensor:
        """losses_TP, float32 (float64 stays), in the order of `Teacher.weights_P`."""
        how, targets_T = self.teacher.config, self.targets_T
        states, y_TC = self._read()
        rows = max(LOGITS // self.teacher.here.cfg.vocab_size, FEWEST)
        chunks = zip(x_TD.split(rows), y_TC.split(rows), targets_T.split(rows), strict=True)
        losses_T2 = torch.cat(
            [
                checkpoint(
                    compare, x_nD, outlet, y_nC, self.teacher.here.outlet, targets_n, how.temperature,
                    use_reentrant=False, preserve_rng_state=False,
                )
                for x_nD, y_nC, targets_n in chunks
            ]
        )  # fmt: skip
        losses_TP = losses_T2
        if how.hidden:
            pairs = self.teacher.pairs.items()
            project = self.teacher.project
            far = [distance(how, project(self.states.pop(mine)), states[theirs]) for mine, theirs in pairs]
            far_T = torch.stack(far).mean(0).where(targets_T >= 0, 0)
            losses_TP = torch.cat([losses_T2, far_T[:, None].to(losses_T2)], -1)
        written_T = self.batch.written_T
        if written_T is None:
            return losses_TP
        written_T1 = written_T.to(losses_TP.device)[:, None]
        return torch.cat([losses_TP.where(~written_T1, 0), losses_T2[:, 1:].where(written_T1, 0)], -1)

    @torch.no_grad()
    def _read(self) -> tuple[dict[int, Tensor], Tensor]:
        """The teacher's hidden states by block and the normed rows for its head, of the tokens held here."""
        model, device = self.teacher.here, self.teacher.mesh.device
        whole = part_of(self.batch, Mesh.alone(device), dropless=True)
        whole.ctx.states = {}
        with torch.autocast(device.type, enabled=False):
            y_WC = model.hidden(whole.tokens_T, whole.positions_A, whole.ctx)
            own_T: Any = slice(None) if self.spread is None else self.spread.own_T
            y_TC = model.into_head(y_WC[own_T])
        return {layer: state[own_T] for layer, state in whole.ctx.states.items()}, y_TC


def compare(x_nD: Tensor, ours: Outlet, y_nC: Tensor, theirs: Outlet, targets_n: Tensor, temperature: float) -> Tensor:
    """Cross entropy and Σ_v p log(p / q), p = softmax(teacher's logits / τ), q = softmax(student's / τ) → [n, 2] nats.

    Both are 0 where the target is negative. Source: Hinton et al. 1503.02531 §2, there without its factor τ².
    """
    with torch.no_grad(), torch.autocast(y_nC.device.type, enabled=False):
        theirs_nV = _scores(theirs.project(y_nC), temperature)
    ours_nV = ours.project(x_nD)
    hard_n = cross_entropy(ours_nV, targets_n)
    soft_n = (theirs_nV.exp() * (theirs_nV - _scores(ours_nV, temperature))).sum(-1)
    return torch.stack([hard_n, soft_n.where(targets_n >= 0, 0).to(hard_n)], -1)


def _scores(logits_nV: Tensor, temperature: float) -> Tensor:
    """Log-probabilities; nothing is rounded below float32 once the logits are there."""
    return (wide(logits_nV) / temperature).log_softmax(-1)


def distance(how: DistillConfig, x_TC: Tensor, y_TC: Tensor) -> Tensor:
    """Of a student's hidden state from a teacher's, [T]: 1 - cos, or the mean square over C."""
    x_TC, y_TC = x_TC.float(), y_TC.float()
    return 1 - cosine_similarity(x_TC, y_TC, dim=-1) if how.distance == "cosine" else (x_TC - y_TC).square().mean(-1)


def add_projection(student: Decoder, how: DistillConfig | None) -> None:
    """Give a student of another width than its teacher the matrix by which its hidden states are compared, unfilled.

    One for all blocks, trained and saved with the student; the servable model has none.
    Source: Jiao et al. 1909.10351 (TinyBERT), eq. 8.

    Raises:
        ConfigError, CheckpointError: there is no such teacher.
    """
    if how is None or not how.hidden:
        return
    theirs, ours = load_config(how.teacher).width, student.cfg.width
    if theirs != ours:
        student.add_module(PROJECTION, nn.Linear(ours, theirs, bias=False))


def check_teacher(config: RunConfig, teacher: Decoder, tokenizer: Tokenizer) -> None:
    """Whether a run can learn from this model.

    Raises:
        ConfigError: it can not.
    """
    how, cfg, model = config.train.distill, teacher.cfg, config.model
    assert how is not None
    name = "train.distill.teacher"
    fix = "use a decoder-only teacher"
    check(cfg.encoder is None, name, how.teacher, "has an encoder, and distillation is of next tokens", fix)
    rule = f"has a vocabulary of {cfg.vocab_size} and the student (model.vocab_size) one of {model.vocab_size}"
    check(cfg.vocab_size == model.vocab_size, name, how.teacher, rule, f"use data.vocab_size={cfg.vocab_size}")
    rule = f"reads at most {cfg.max_seq_len} tokens, and train.seq_len is {config.train.seq_len}"
    check(cfg.max_seq_len >= config.train.seq_len, name, how.teacher, rule, f"use train.seq_len={cfg.max_seq_len}")
    with tokenizer_directory(how.teacher) as directory:
        theirs = Tokenizer.load(directory) if (directory / TOKENIZER).is_file() else tokenizer  # it was given one
    if theirs.digest != tokenizer.digest:
        raise ConfigError(
            f"{name} ({how.teacher}) has another tokenizer (sha256 {theirs.digest[:12]}) than the run "
            f"({config.data.tokenizer or config.data.path}: {tokenizer.digest[:12]}): leave data.tokenizer out"
        )


def _watch(model: Decoder, layers: Any) -> None:
    """Have these blocks leave what they return in the context, where it is wanted."""
    for layer in set(layers):
        model.blocks.get_submodule(str(layer)).register_forward_hook(_keep)


def _keep(block: Any, args: tuple[Any, ...], x_TD: Tensor) -> None:
    ctx = args[2]
    if isinstance(ctx, VarlenContext) and ctx.states is not None:  # a server's context asks for none
        ctx.states[block.layer] = x_TD
