"""A student that writes rows of its own: they are what the engine samples, the teacher alone judges them."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from turnout import ConfigError
from turnout.inference.config import EngineConfig
from turnout.inference.core.sampling import SamplingParams
from turnout.inference.engine import Engine
from turnout.inference.machine import Machine
from turnout.inference.text.tokenizer import TextTokenizer
from turnout.inference.write import write
from turnout.launch.compose import compose
from turnout.launch.main import main
from turnout.moe.data.rows import Batch, Cursor, segments
from turnout.moe.train.distill_config import DistillConfig
from turnout.moe.train.loop import Trainer
from turnout.parallel import process
from turnout.parallel.config import ParallelConfig
from turnout.parallel.mesh import build_mesh
from turnout.tests.helpers.ranks import run_ranks
from turnout.tests.helpers.runs import corpus, fingerprint, rows, tiny

PROMPT, LENGTH, BATCH = 8, 32, 4


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Of a dense student of a sparse teacher, which writes half of its rows itself."""
    place = tmp_path_factory.mktemp("on_policy")
    own = tiny(corpus(place), "train.dtype=float32", "train.save_every=null", "optim=adamw", "train.eval_bytes=2000")
    go(str(place / "teacher"), [*own, "moe=gshard", "moe.num_experts=4", "optim.lr=0.01", "train.steps=3"])
    how = ["train.distill.on_policy=0.5", f"train.distill.on_policy_prompt={PROMPT}", "train.distill.hidden=2"]
    how += ["train.distill.temperature=2", "train.distill.soft=0.4"]
    return [*own, "model.moe=null", f"train.distill.teacher={place / 'teacher'}", *how]


@pytest.fixture(scope="module")
def made(words, tmp_path_factory):
    """A trainer before its first step."""
    made = trainer(str(tmp_path_factory.mktemp("made")), words)
    yield made
    made.metrics.close()


def trainer(run: str, words: list[str], steps: int | None = None) -> Trainer:
    config = compose(words, world=process.world()).config
    Path(run).mkdir(exist_ok=True)
    moe, votes = config.model.moe, iter(range(10**9))
    mesh = build_mesh(config.parallel, "cpu", moe.num_experts if moe else None)
    return Trainer(config, Path(run), mesh, lambda: next(votes) == steps, write)


def go(run: str, words: list[str], steps: int | None = None) -> None:
    trainer(run, words, steps).run()


def rewritten(made: Trainer, step: int = 0, rank: int = 0, size: int = 1, micro: int = 0, each: int | None = None):
    batch = made.setup.rows.batch(made.now.cursor, BATCH, rank, size, micro, each)
    assert made.author is not None
    return made.author.rewrite(batch, made.now.cursor, step)


def written_rows(batch: Batch) -> list[int]:
    assert batch.written_T is not None
    return batch.written_T[::LENGTH].nonzero().flatten().tolist()


def test_a_row_is_what_the_engine_samples_from_the_weights_of_the_step(made, tmp_path):
    text, own = made.setup.rows.batch(made.now.cursor, BATCH), rewritten(made)
    assert made.setup.model.training
    assert len(written_rows(own)) == 2
    made.setup.tokenizer.save(tmp_path)
    tokenizer, end = TextTokenizer.from_dir(tmp_path), made.setup.tokenizer.eos_id
    config = EngineConfig(deterministic=True, max_num_seqs=1, max_num_batched_tokens=5)
    engine = Engine(made.setup.model.eval(), tokenizer, config)
    for row in range(BATCH):
        here = slice(row * LENGTH, (row + 1) * LENGTH)
        tokens, before = own.tokens_T[here].tolist(), text.tokens_T[here].tolist()
        if row not in written_rows(own):
            assert tokens == before
            assert torch.equal(own.targets_T[here], text.targets_T[here])
            continue
        assert tokens[:PROMPT] == before[:PROMPT]
        assert tokens != before
        assert own.targets_T[here].tolist() == [-1] * (PROMPT - 1) + tokens[PROMPT:] + [-1]
        at = PROMPT
        while at < LENGTH:
            begin = max((i for i in range(1, at) if tokens[i] == end), default=0)
            key = made.author._key(0, int(own.index_T[here][0]) // LENGTH, at)
            params = SamplingParams(max_tokens=LENGTH - at, seed=key, ignore_eos=True, stop_token_ids=[end])
            engine.add_request(f"{row} {at}", tokens[begin:at], params)
            while engine.has_unfinished:
                outputs = engine.step()
            sampled = outputs[0].outputs[0].token_ids
            assert tokens[at : at + len(sampled)] == sampled
            at += len(sampled)
    engine.close()
    made.setup.model.train()
    assert own.total_tokens == text.total_tokens - 2 * PROMPT == int((own.targets_T >= 0).sum())
    assert own.written_tokens == 2 * (LENGTH - PROMPT)


def test_a_text_that_ends_is_followed_by_another_that_sees_nothing_of_it(made, monkeypatch):
    end, asked = made.setup.tokenizer.eos_id, []

    def generate(model, prompts, counts, seeds, stop):
        asked.append((prompts, seeds, stop, model.training))
        return [[7, 7, end][:count] for count in counts]

    monkeypatch.setattr(made.author, "generate", generate)
    own = rewritten(made)
    for row in written_rows(own):
        tokens, positions = own.tokens_T.view(BATCH, LENGTH)[row], own.positions_T.view(BATCH, LENGTH)[row]
        assert tokens[PROMPT:].tolist() == [7, 7, end] * 8
        assert positions[PROMPT + 2 :].tolist() == [*[0, 1, 2] * 7, 0]
    assert all(prompts == [[end]] * 2 for prompts, *_ in asked[1:])
    assert {(stop, training) for *_, stop, training in asked} == {(end, False)}
    assert len({seed for _, seeds, *_ in asked for seed in seeds}) == 2 * len(asked)
    _, borders = segments((own.tokens_T == end).numpy().reshape(BATCH, LENGTH))
    assert torch.equal(own.cu_seqlens, borders)


def test_its_loss_is_the_teachers_alone_and_the_texts_rows_keep_theirs(made):
    made.taught = True
    inputs = made._inputs(0)
    lesson = made.parts[0].ctx.loss
    written_T = lesson.batch.written_T
    losses_TP = made.setup.engine.forward(*inputs)
    loss = made._loss(0, losses_TP)
    made.parts[0].ctx.loss = replace(lesson, batch=replace(lesson.batch, written_T=None))
    hard_T, soft_T, far_T = made.setup.engine.forward(*inputs).unbind(-1)
    made.parts.clear()
    text_T = 0.6 * hard_T + 0.4 * 2**2 * soft_T + 2 * far_T
    torch.testing.assert_close(loss, torch.where(written_T, 2**2 * soft_T, text_T).sum() / made.targets)
    assert not losses_TP[written_T][:, :3].any()
    assert not losses_TP[~written_T][:, 3].any()
    assert made.written == 2 * (LENGTH - PROMPT) == int((losses_TP[:, 3] != 0).sum())


def test_no_layout_changes_what_is_written_and_every_step_writes_anew(made):
    whole = rewritten(made)
    for size, each in ((2, None), (2, 1), (4, None)):
        parts = [
            rewritten(made, 0, rank, size, micro, each)
            for rank in range(size)
            for micro in range(BATCH // size // (each or BATCH // size))
        ]
        for name in ("tokens_T", "targets_T", "positions_T", "written_T"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name)), name
        assert {(p.total_tokens, p.written_tokens) for p in parts} == {(whole.total_tokens, whole.written_tokens)}
    assert torch.equal(rewritten(made).tokens_T, whole.tokens_T)
    assert not torch.equal(rewritten(made, 1).tokens_T, whole.tokens_T)


@pytest.mark.full
def test_two_ranks_learn_what_one_does(words, tmp_path):
    go(str(tmp_path / "one"), [*words, "train.steps=3"])
    run_ranks(go, 2, str(tmp_path / "two"), [*words, "train.steps=3", "parallel.dp=2", "train.micro_batch=1"])
    for ours, theirs in zip(rows(tmp_path / "two"), rows(tmp_path / "one"), strict=True):
        for name in ("loss", "distill_loss", "hidden_loss", "on_policy_loss", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=2e-5), name


def test_a_run_goes_on_to_the_bit_and_behind_the_stop_the_text_has_all_rows(words, tmp_path):
    student = [*words, "train.distill.stop=0.6", "train.dtype=bfloat16", "train.steps=3", "train.micro_batch=2"]
    go(str(tmp_path / "whole"), student)
    for steps in (1, None):
        go(str(tmp_path / "parts"), [*student, "train.resume=true"], steps)
    assert fingerprint(tmp_path / "whole", 3) == fingerprint(tmp_path / "parts", 3)
    for name in ("loss", "distill_loss", "on_policy_loss"):
        assert [r[name] for r in rows(tmp_path / "whole")] == [r[name] for r in rows(tmp_path / "parts")]
    found = rows(tmp_path / "whole")
    assert [row["on_policy_loss"] is None for row in found] == [False, False, True]
    targets = BATCH * LENGTH - 2 * PROMPT
    assert [row["tokens"] for row in found] == [targets, 2 * targets, 2 * targets + BATCH * LENGTH]


def test_rows_of_text_keep_their_borders_and_padding_its_own(made):
    source = made.setup.rows
    last = next(i for i in range(len(source)) if (source.batch(Cursor(0, i), 1).targets_T < 0).any())
    cursor = Cursor(0, last - 1)
    text = source.batch(cursor, BATCH)
    own = made.author.rewrite(text, cursor, 0)
    told = ~own.written_T
    assert not told.all()
    assert (text.targets_T[told] < 0).any()
    for name in ("tokens_T", "targets_T", "positions_T"):
        assert torch.equal(getattr(own, name)[told], getattr(text, name)[told]), name


def test_a_plan_says_what_writing_takes(words, made, tmp_path, capsys):
    path, sizes = tmp_path / "plan.json", []
    for more in ([], ["train.micro_batch=1"], ["train.distill.on_policy=0"]):
        assert main(["plan", *words, *more, "world=1", "accelerator=cpu", f"json={path}"]) == 0
        sizes.append(json.loads(path.read_text())["writing_bytes"])
        assert ("writing  " in capsys.readouterr().out) == bool(sizes[-1])
    for count, size in zip((2, 1), sizes, strict=False):
        config = EngineConfig(max_num_seqs=count, num_blocks=1 + 2 * count, max_model_len=LENGTH)  # of 16 tokens
        plan = Machine(made.setup.model.eval(), config, time.monotonic).memory
        assert size == plan.activations + plan.cache
    made.setup.model.train()
    assert sizes[2] == 0


def test_its_share_is_kept_to_the_row_over_the_steps(made, monkeypatch):
    monkeypatch.setattr(made.author, "a_step", 0.3 * BATCH)
    whole = made.setup.rows.batch(made.now.cursor, BATCH)
    counts = [len(made.author.choose(whole, step)) for step in range(10)]
    assert sum(counts) == 0.3 * BATCH * 10
    assert set(counts) == {1, 2}
    short = replace(whole, targets_T=whole.targets_T.clone().fill_(-1))
    assert made.author.choose(short, 0) == set()  # the padded end of a text is nothing to go on from


@pytest.mark.full
def test_what_it_writes_comes_nearer_to_what_its_teacher_would_say(words, tmp_path):
    quick = [*(word for word in words if "distill" not in word), "optim.lr=0.01", "train.steps=60", "log.every=5"]
    go(str(tmp_path / "teacher"), quick)
    how = [f"train.distill.teacher={tmp_path / 'teacher'}", "train.distill.on_policy=0.75", "train.distill.soft=1"]
    go(str(tmp_path / "run"), [*quick, *how, "seed=1"])
    far = [row["on_policy_loss"] for row in rows(tmp_path / "run")]
    assert far[-1] < 0.7 * far[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parallel": {"tp": 2}}, r"parallel.tp \(2\) is not built for train.distill.on_policy.*: use parallel.tp=1"),
        ({"parallel": {"cp": 2}}, r"parallel.cp \(2\) is not built for train.distill.on_policy"),
        ({"parallel": {"ep": 2}}, r"parallel.ep \(2\) is not built for train.distill.on_policy"),
        ({"parallel": {"fsdp": True}}, r"parallel.fsdp \(True\) is not built for .*: use parallel.fsdp=false"),
        ({"engine": "deepspeed"}, r"engine \(deepspeed\) is not built for train.distill.on_policy.*: use engine=nat"),
        ({"parallel": {"pp": 2}}, r"parallel.pp \(2\) is not built for train.distill.on_policy"),
        ({"on_policy": 0.8}, r"on_policy \(0.8\) must leave the text a row of each step's 4 .*: use 0.75 or less"),
        ({"on_policy_prompt": 32}, r"on_policy_prompt \(32\) must leave room in a row of 32 tokens .*: use 16"),
    ],
)
def test_a_run_in_which_nobody_can_write_is_refused(made, change, message):
    config, how = made.config, {name: value for name, value in change.items() if name.startswith("on_policy")}
    parallel = ParallelConfig(**change.get("parallel", {}))
    distill = replace(config.train.distill, hidden=0.0, **how)
    engine, train = change.get("engine", "native"), replace(config.train, distill=distill)
    with pytest.raises(ConfigError, match=message):
        replace(config, engine=engine, parallel=parallel, train=train)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"on_policy": 1.0}, r"train.distill.on_policy \(1.0\) must lie in \[0, 1\)"),
        ({"on_policy_prompt": 0}, r"train.distill.on_policy_prompt \(0\) must be at least 1"),
    ],
)
def test_what_can_not_be_is_refused_at_birth(values, message):
    with pytest.raises(ConfigError, match=message):
        DistillConfig(teacher="x", **values)


def test_a_student_whose_router_looks_ahead_is_refused_before_its_first_step(words, tmp_path):
    ahead = [*(word for word in words if word != "model.moe=null"), "moe=expert_choice", "moe.num_experts=2"]
    ahead += ["moe.noncausal=true"]
    with pytest.raises(ConfigError, match=r"moe.router \(expert_choice\) looks at tokens .*on_policy=0"):
        trainer(str(tmp_path / "run"), ahead)


def test_a_trainer_that_nobody_gave_a_generator_says_so(made, tmp_path):
    with pytest.raises(ConfigError, match=r"on_policy \(0.5\) needs someone who generates: start the run by"):
        Trainer(made.config, tmp_path, build_mesh(made.config.parallel, "cpu"), lambda: False)
