"""A student: its losses are the formulas, no layout or chunk changes them, and it resumes to the bit."""

import json
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turnout import ConfigError, NonFiniteError
from turnout.launch.compose import compose
from turnout.launch.main import main
from turnout.launch.plan import teacher_bytes
from turnout.moe.data.tokenizer import Tokenizer
from turnout.moe.layers.embedding import Head
from turnout.moe.models.store import load_config, load_model, save_model
from turnout.moe.train import distill
from turnout.moe.train.distill_config import DistillConfig
from turnout.moe.train.loop import Outcome, Trainer
from turnout.parallel import process
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

NUMBERS = ("loss", "distill_loss", "hidden_loss", "grad_norm")
LAYOUTS = [
    pytest.param(["parallel.ep=2", "train.micro_batch=1"], id="ep and accumulation"),
    pytest.param(["parallel.dp=2", "train.recompute=full"], id="dp and recomputation", marks=pytest.mark.full),
    pytest.param(["parallel.tp=2"], id="tp", marks=pytest.mark.full),
    pytest.param(["parallel.cp=2"], id="cp", marks=pytest.mark.full),
    pytest.param(["parallel.fsdp=true", "parallel.ep=2"], id="fsdp", marks=pytest.mark.full),
    pytest.param(["engine=deepspeed", "parallel.ep=2"], id="deepspeed", marks=pytest.mark.full),
    pytest.param(
        ["engine=deepspeed", "parallel.zero=2", "train.micro_batch=1"],
        id="zero-2 and accumulation",
        marks=pytest.mark.full,
    ),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Of a student of a sparse teacher that has learned for a few steps."""
    place = tmp_path_factory.mktemp("distill")
    own = tiny(corpus(place), "train.dtype=float32", "train.save_every=null", "optim=adamw")
    go(str(place / "teacher"), [*own, "moe=gshard", "moe.num_experts=4", "optim.lr=0.01"])
    return [*own, f"train.distill.teacher={place / 'teacher'}"]


def trainer(run: str, words: list[str], steps: int | None = None) -> Trainer:
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    moe, votes = config.model.moe, iter(range(10**9))
    mesh = build_mesh(config.parallel, "cpu", moe.num_experts if moe else None)
    return Trainer(config, Path(run), mesh, lambda: next(votes) == steps)


def go(run: str, words: list[str], steps: int | None = None) -> Outcome:
    return trainer(run, words, steps).run()


def first_losses(run: Path, words: list[str]) -> tuple[Trainer, torch.Tensor]:
    """The trainer and losses_TP of the first micro-batch."""
    made = trainer(str(run), words)
    made.taught = True
    made.setup.model.train()
    return made, made.setup.engine.forward(*made._inputs(0))


def test_two_distributions_are_compared_as_the_formula_says():
    torch.manual_seed(0)
    x_nD, y_nC, ours, theirs = torch.randn(5, 4).double(), torch.randn(5, 6).double(), Head(4, 9), Head(6, 9)
    x_nD.requires_grad_()
    targets_n, tau = torch.tensor([0, 8, -1, 3, 3]), 2.0
    losses_n2 = distill.compare(x_nD, ours.double(), y_nC, theirs.double(), targets_n, tau)
    z_nV, t_nV = x_nD @ ours.weight.T, y_nC @ theirs.weight.T
    p_nV, q_nV = (t_nV / tau).softmax(-1), (z_nV / tau).softmax(-1)
    valid = targets_n >= 0
    torch.testing.assert_close(losses_n2[:, 1], (p_nV * (p_nV / q_nV).log()).sum(-1) * valid)
    assert float(losses_n2[2].abs().sum().detach()) == 0
    (grad,) = torch.autograd.grad(tau**2 * losses_n2[:, 1].sum(), x_nD)
    torch.testing.assert_close(grad, tau * ((q_nV - p_nV) * valid[:, None]) @ ours.weight)


def test_a_narrow_models_logits_are_not_rounded_again_by_the_temperature():
    torch.manual_seed(0)
    x_nD, y_nC, head = torch.randn(5, 4).bfloat16(), torch.randn(5, 4).bfloat16(), Head(4, 9).bfloat16()
    found = distill.compare(x_nD, head, y_nC, head, torch.zeros(5, dtype=torch.int64), 3.0)[:, 1]
    z_nV, t_nV = head.project(x_nD).double(), head.project(y_nC).double()
    p_nV, q_nV = (t_nV / 3).softmax(-1), (z_nV / 3).softmax(-1)
    torch.testing.assert_close(found.double(), (p_nV * (p_nV / q_nV).log()).sum(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["cosine", pytest.param("mse", marks=pytest.mark.full)])
def test_chunks_change_nothing_and_the_parts_are_mixed_as_the_run_says(words, tmp_path, monkeypatch, kind):
    more = ["model.moe=null", "model.layers=1", "train.distill.hidden=3", f"train.distill.distance={kind}"]
    more += ["train.distill.soft=0.4", "train.distill.temperature=2"]
    found = []
    for name, rows_at_once in (("whole", 10**6), ("pieces", 3)):
        monkeypatch.setattr(distill, "LOGITS", 1)
        monkeypatch.setattr(distill, "FEWEST", rows_at_once)
        made, losses_TP = first_losses(tmp_path / name, [*words, *more])
        made._loss(0, losses_TP).backward()
        found.append((losses_TP.detach(), {n: p.grad for n, p in made.setup.model.named_parameters()}))
        made.metrics.close()
    assert losses_TP.shape == (4 * 32, 3)
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)
    assert made.setup.teacher is not None
    entropy, soft, hidden = losses_TP.detach().sum(0)
    mixed = made.setup.teacher.mix(losses_TP.detach().sum(0))
    torch.testing.assert_close(mixed, 0.6 * entropy + 0.4 * 2**2 * soft + 3 * hidden)
    assert made.setup.teacher.pairs == {0: 1}  # last to last


@pytest.mark.parametrize(
    "start", [pytest.param(False, marks=pytest.mark.full), True], ids=["drawn", "from a checkpoint"]
)
def test_a_student_of_another_width_learns_to_bring_its_states_to_the_teachers(words, tmp_path, start):
    more = [*words, "model.moe=null", "model.width=24", "train.distill.hidden=3", "train.distill.distance=mse"]
    if start:
        go(str(tmp_path / "init"), [*more, "train.distill.hidden=0", "train.steps=1"])
        more += [f"train.init={tmp_path / 'init'}"]
    more += ["train.steps=2"]
    made, losses_TP = first_losses(tmp_path / "run", more)
    weight_CD = made.setup.model.get_parameter("projection.weight")
    assert weight_CD.shape == (32, 24)
    inputs = made._inputs(0)
    made.setup.model.hidden(*inputs)
    ours, (theirs, _) = inputs[-1].states, inputs[-1].loss._read()
    far_T = sum((ours[layer] @ weight_CD.T - theirs[layer]).square().mean(-1) / 2 for layer in range(2))
    torch.testing.assert_close(losses_TP[:, 2], far_T.where(made.parts[0].targets_T >= 0, 0))
    made.parts.clear()
    before = weight_CD.detach().clone()
    assert made.run() == Outcome(step=2, preempted=False)
    assert not torch.equal(weight_CD, before)
    assert not any("projection" in name for name in load_model(tmp_path / "run").state_dict())


def test_a_student_that_is_its_teacher_has_nothing_to_learn(words, tmp_path):
    teacher = words[-1].partition("=")[2]
    same = [*words, f"train.init={teacher}", "train.distill.hidden=1", "moe.eval_capacity_factor=null"]
    made, losses_TP = first_losses(tmp_path / "run", [*same, "moe.capacity_factor=null", "moe.second_policy=all"])
    made.metrics.close()
    assert float(losses_TP[:, 0].mean().detach()) > 1
    assert float(losses_TP[:, 1:].abs().max().detach()) < 1e-5


def test_what_a_lesson_has_read_goes_with_its_micro_batch(words, tmp_path):
    made, losses_TP = first_losses(tmp_path / "run", [*words, "train.distill.hidden=1"])
    made.metrics.close()
    context = weakref.ref(made.parts[0].ctx)
    del losses_TP
    made.parts.clear()
    assert context() is None


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_learn_what_one_does(words, tmp_path, layout):
    student = [*words, "moe=switch", "moe.num_experts=2", "moe.every=1", "train.distill.hidden=1", "train.steps=3"]
    student += ["train.distill.temperature=2", "model.width=24"]  # with a projection
    go(str(tmp_path / "one"), student)
    run_ranks(go, 2, str(tmp_path / "two"), [*student, *layout])
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert [row["step"] for row in two] == [1, 2, 3]
    for ours, theirs in zip(two, one, strict=True):
        for name in NUMBERS:
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name
    alone, together = (load_model(tmp_path / name).state_dict() for name in ("one", "two"))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.full
def test_the_last_rank_of_a_pipeline_has_the_teacher(words, tmp_path):
    student = [*words, "model.moe=null", "train.micro_batch=1", "train.steps=3"]
    go(str(tmp_path / "one"), student)
    run_ranks(go, 2, str(tmp_path / "two"), [*student, "parallel.pp=2"])
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for name in ("loss", "distill_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name


def test_a_run_goes_on_to_the_bit_before_and_behind_the_stop(words, tmp_path):
    student = [*words, "model.moe=null", "train.distill.stop=0.5", "train.distill.hidden=1", "train.dtype=bfloat16"]
    student += ["model.width=24"]  # with a projection
    go(str(tmp_path / "whole"), student)
    for steps in (2, 2, None):
        go(str(tmp_path / "parts"), [*student, "train.resume=true"], steps)
    assert fingerprint(tmp_path / "whole", 6) == fingerprint(tmp_path / "parts", 6)
    taught = [row["distill_loss"] is not None for row in rows(tmp_path / "parts")]
    assert taught == [True, True, True, False, False, False]
    for name in NUMBERS:
        assert [r[name] for r in rows(tmp_path / "whole")] == [r[name] for r in rows(tmp_path / "parts")]


@pytest.mark.full
def test_a_student_comes_near_its_teacher_and_one_without_does_not(words, tmp_path):
    far = []
    for name, soft in (("taught", 1.0), ("alone", 1e-9)):
        more = ["model.moe=null", f"train.distill.soft={soft}", "train.steps=20", "optim.lr=0.01", "log.every=10"]
        go(str(tmp_path / name), [*words, *more])
        far.append([row["distill_loss"] for row in rows(tmp_path / name)])
    taught, alone = far
    assert taught[-1] < taught[0]
    assert taught[-1] < 0.9 * alone[-1]


@pytest.mark.full
def test_a_teacher_may_be_rounded_and_is_planned_as_it_is_held(words, tmp_path):
    small = tmp_path / "small"
    assert (
        main(["compress", words[-1].partition("=")[2], str(small), "method=int8", "max_bytes=1000", "speed=false"]) == 0
    )
    student = [*words, "model.moe=null", f"train.distill.teacher={small}", "train.dtype=bfloat16", "train.steps=2"]
    go(str(tmp_path / "run"), student)
    assert all(0 < row["distill_loss"] < 10 for row in rows(tmp_path / "run"))
    held = load_model(small, "bfloat16").state_dict().values()
    assert teacher_bytes(compose(student).config) == sum(part.nbytes for part in held)


def test_the_vocabulary_and_the_tokenizer_follow_the_teacher_whose_memory_is_planned(words):
    quiet = [word for word in words if not word.startswith("data.vocab_size")]
    config = compose(quiet).config
    assert config.model.vocab_size == config.data.vocab_size == 400
    assert teacher_bytes(config) == sum(4 * w.numel() for w in load_model(config.train.distill.teacher).parameters())
    assert Path(str(config.data.tokenizer)) == Path(words[-1].partition("=")[2]) / "model"
    with pytest.raises(ConfigError, match=r"data.vocab_size \(500\) contradicts train.distill.teacher \(.*400"):
        compose([*quiet, "data.vocab_size=500"])
    with pytest.raises(ConfigError, match=r"model.vocab_size \(500\) contradicts train.distill.teacher \(.*400"):
        compose([*quiet, "model.vocab_size=500"])
    with pytest.raises(ConfigError, match=r"train.distill.teacher \(nowhere\) must be a model"):
        compose([*quiet, "train.distill.teacher=nowhere"])
    with pytest.raises(ConfigError, match=r"train.distill.teacher is missing"):
        compose([*quiet[:-1], "train.distill.temperature=2"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_seq_len": 16}, "reads at most 16 tokens, and train.seq_len is 32"),
        ({"vocab_size": 401}, r"has a vocabulary of 401 and the student \(model.vocab_size\) one of 400"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(words, change, message):
    config = compose([*words, "model.moe=null", "train.distill.hidden=1"]).config
    teacher = load_model(config.train.distill.teacher)
    teacher.cfg = replace(teacher.cfg, **change)
    with pytest.raises(ConfigError, match=message):
        distill.check_teacher(config, teacher, Tokenizer.load(config.data.tokenizer))


@pytest.mark.full
def test_a_teacher_whose_numbers_are_none_is_named(words, tmp_path):
    teacher = Path(words[-1].partition("=")[2]) / "model"
    tensors = load_model(teacher).state_dict()
    save_model(
        tmp_path / "huge", load_config(teacher), {**tensors, "norm.weight": tensors["norm.weight"] * 1e6}, teacher
    )
    student = [*words, "model.moe=null", f"train.distill.teacher={tmp_path / 'huge'}", "train.steps=1"]
    go(str(tmp_path / "wide"), student)
    with pytest.raises(NonFiniteError, match=r"the teacher's losses alone are not: .* train.dtype \(float16\)"):
        go(str(tmp_path / "narrow"), [*student, "train.dtype=float16"])


def test_a_teacher_of_another_tokenizer_is_refused(words, tmp_path):
    teacher = Path(words[-1].partition("=")[2]) / "model"
    other = tmp_path / "other"
    save_model(other, load_config(teacher), load_model(teacher).state_dict(), teacher)
    table = json.loads((other / "tokenizer.json").read_text())
    table["model"]["merges"] = table["model"]["merges"][:-1]
    (other / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"data.tokenizer \(.*\) is not the tokenizer of train.distill.teacher"):
        compose([*words, f"train.distill.teacher={other}", f"data.tokenizer={teacher}"])
    config = compose([*words, "model.moe=null"]).config
    config = replace(config, train=replace(config.train, distill=DistillConfig(teacher=str(other))))
    tokenizer = Tokenizer.load(teacher)
    with pytest.raises(ConfigError, match=r"has another tokenizer \(sha256 .*\) than the run"):
        distill.check_teacher(config, load_model(teacher), tokenizer)
    (other / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match=r"data.tokenizer \(None\) must be given, for train.distill.teacher"):
        compose([*words, f"train.distill.teacher={other}"])
    assert compose([*words, f"train.distill.teacher={other}", f"data.tokenizer={teacher}"])
    distill.check_teacher(config, load_model(teacher), tokenizer)  # of what it has not, the run's is taken at its word


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"teacher": ""}, r"train.distill.teacher \(''\) must name a model"),
        ({"temperature": 0.0}, r"train.distill.temperature \(0.0\) must be positive and finite"),
        ({"soft": 0.0}, r"train.distill.soft \(0.0\) must lie above 0 and up to 1"),
        ({"stop": 1.5}, r"train.distill.stop \(1.5\) must lie above 0 and up to 1"),
        ({"hidden": -1.0}, r"train.distill.hidden \(-1.0\) must not be negative"),
        ({"layers": (1,)}, "and train.distill.hidden is 0"),
        ({"distance": "far"}, "train.distill.distance"),
    ],
)
def test_what_can_not_be_is_refused_at_birth(values, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(**{"teacher": "x", **values})


def test_blocks_are_paired_evenly_or_as_told():
    how = DistillConfig(teacher="x", hidden=1.0)
    assert how.pairs(3, 6) == {0: 1, 1: 3, 2: 5}
    assert how.pairs(4, 6) == {0: 1, 1: 2, 2: 4, 3: 5}
    assert replace(how, layers=(0, 5)).pairs(2, 6) == {0: 0, 1: 5}
    for layers in ((0,), (0, 6)):
        with pytest.raises(ConfigError, match="must name one of the teacher's blocks"):
            replace(how, layers=layers).pairs(2, 6)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("parallel.pp=2 train.micro_batch=1 train.distill.hidden=1", r"train.distill.hidden \(1.0\) compares blocks"),
        ("engine=deepspeed parallel.zero=3 nproc=2", "is not built for parallel.zero=3"),
    ],
)
def test_a_run_that_can_not_be_taught_is_refused(words, more, message):
    with pytest.raises(ConfigError, match=message):
        compose([*words, "model.moe=null", *more.split()], world=2)
