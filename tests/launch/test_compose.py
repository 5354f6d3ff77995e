"""A bad configuration is answered in a blink: exit 2, one line with field, value, rule and fix, and no torch."""

import subprocess
import sys

import pytest

from turnout import ConfigError
from turnout.configs.typed import build, to_dict
from turnout.launch import main as cli
from turnout.launch.compose import compose
from turnout.moe.train.config import RunConfig, identity

# What a user may type → what the answer must name. Each is added to `experiment=switch_pydocs`.
BAD = [
    ("model.widht=64", "model.widht (64) is not a setting: did you mean model.width?"),
    ("widht=64", "did you mean model.width?"),
    ("trian.steps=5", "trian.steps (5) is not a setting"),
    ("seeds=1", "did you mean seed?"),
    ("moe.num_expert=4", "did you mean moe.num_experts?"),
    ("+model.extra=1", "'+model.extra=1' adds or deletes a key"),
    ("~model.width", "adds or deletes a key"),
    ("fast", "'fast' has no '='"),
    ("model.attention.sink=true", "model.attention.sink (true) is not a setting: did you mean model.attention.sinks?"),
    ("model.attention.latent.rank=8", "model.attention.latent.rope_dim is missing"),
    ("model.moe.num_experts=4", "model.moe.num_experts (4) is not a setting: did you mean moe.num_experts?"),
    ("model.width=[", "does not read as key=value"),
    ("experiment=swich_pydocs", "did you mean experiment=switch_pydocs?"),
    ("moe=swich", "moe (swich) is not one of its options: did you mean moe=switch?"),
    ("moe=dropless", "moe (dropless) is not one of its options: use one of base, deepseek_v2, deepseek_v3, "),
    ("optim=sgd", "optim (sgd) is not one of its options"),
    ("model=null", "model (None) is not one of its options"),
    ("model.width=wide", "model.width ('wide') must be a whole number"),
    ("model.width=64.5", "model.width (64.5) must be a whole number"),
    ("model.layers=0", "model.layers (0) must be at least 1"),
    ("model.kv_heads=4", "model.kv_heads (4) must divide model.heads (6): use 1, 2, 3 or 6"),
    ("model.head_dim=33", "model.head_dim (33) must be even"),
    ("model.vocab_size=100", "model.vocab_size (100) must equal data.vocab_size"),
    ("model.moe=3", "model.moe (3) must be null or left alone"),
    ("model.tie_embeddings=1", "model.tie_embeddings (1) must be true or false"),
    ("data.vocab_size=10", "data.vocab_size (10) must lie in 257"),
    ("data.path=", "data.path ('') must not be empty"),
    ("moe.top_k=2", "moe.top_k (2) must be 1 for moe.router=switch"),
    ("moe.top_k=9", "moe.top_k (9) can not exceed moe.num_experts (8)"),
    ("moe.router=gshrad", "moe.router ('gshrad') must be one of dense, softmax, "),
    ("moe.router=expert_choice", "moe.router (expert_choice) lets a token's experts depend on later tokens"),
    ("moe=deepseek_v3 moe.top_k=9", "moe.top_k (9) can not exceed the 8 experts of the moe.top_groups (2) groups"),
    ("moe=base moe.balance_loss=0.1", "moe.balance_loss (0.1) has no place beside moe.router=sinkhorn"),
    ("moe.load_loss=0.1", "moe.load_loss (0.1) is not read by moe.router=switch"),
    ("moe.trac=true", "moe.trac (true) is not a setting: did you mean moe.trace?"),
    ("moe.trace=2", "moe.trace (2) must be true or false"),
    ("trace=true", "trace (true) is not a setting: did you mean moe.trace?"),
    ("moe.replay=", "moe.replay ('') must name a directory: use moe.replay=runs/NAME"),
    ("model.moe=null moe.trace=true", "moe.trace (True) needs routers, which a dense model does not have"),
    ("model.moe=null moe.replay=runs/a", "moe.replay (runs/a) needs routers, which a dense model does not have"),
    ("moe.capacity_factor=0", "moe.capacity_factor (0.0) must be positive"),
    ("moe.capacity_factor=.nan", "moe.capacity_factor"),
    ("moe.jitter=1.5", "moe.jitter (1.5) must lie in [0, 1)"),
    ("moe.every=5", "moe.every (5) and moe.first_dense (0) leave no MoE block in model.layers (4)"),
    ("moe.width=64", "moe.width (64) must equal model.width (192)"),
    ("moe.capacity_tokens=64", "moe.capacity_tokens (64) must equal train.seq_len (256)"),
    ("moe.num_experts=7", "parallel.ep (2) must divide moe.num_experts (7): use 1 or 7"),
    ("parallel.ep=3", "parallel.ep (3) must divide the data-parallel ranks (2): use 1 or 2"),
    ("parallel.dp=4", "parallel.dp (4) must equal the number of ranks (2)"),
    (
        "parallel.cp=2 train.global_batch=1 train.seq_len=255",
        "train.seq_len (255) times the 1 rows of a micro-batch must be a multiple of the 4 pieces in which parallel.cp "
        "(2) and parallel.tp (1) divide its tokens: use 256",
    ),
    (
        "engine=deepspeed optim=adamw train.dtype=float32 parallel.cp=2",
        "parallel.cp (2) is not built for engine=deepspeed",
    ),
    (
        "parallel.pp=2 parallel.ep=1",
        "train.micro_batch (None) cuts a rank's 8 rows into 1, and a pipeline needs at least parallel.pp (2) "
        "micro-batches: use train.micro_batch=4",
    ),
    (
        "parallel.pp=2 parallel.virtual=2 parallel.ep=1 train.global_batch=6 train.micro_batch=2",
        "into 3, and a pipeline needs a multiple of parallel.pp (2) micro-batches: use train.micro_batch=3",
    ),
    (
        "parallel.pp=2 parallel.ep=1 train.global_batch=1",
        "micro-batches: use train.global_batch=2 or a multiple",
    ),
    (
        "parallel.pp=2 parallel.ep=1 parallel.fsdp=true train.micro_batch=2",
        "parallel.pp (2) holds parameters whole while micro-batches are under way, which parallel.fsdp spreads: use",
    ),
    (
        "parallel.pp=2 parallel.virtual=4 parallel.ep=1",
        "parallel.pp (2) times parallel.virtual (4) can not exceed model.layers (4): use fewer",
    ),
    (
        "engine=deepspeed optim=adamw train.dtype=float32 parallel.ep=1 parallel.pp=2",
        "parallel.pp (2) sums its own gradients and is built for engine=native: use engine=native",
    ),
    ("parallel.tp=3", "parallel.tp (3) must fit the ranks"),
    ("parallel.tp=2 model.heads=3 model.kv_heads=1", "model.heads (3) must be a multiple of parallel.tp (2): use"),
    (
        "parallel.tp=2 model.heads=6 model.kv_heads=3",
        "model.kv_heads (3) must divide parallel.tp (2) or be a multiple of it: use parallel.tp=1",
    ),
    ("parallel.tp=2 model.ffn_width=513", "model.ffn_width (513) must be a multiple of parallel.tp (2): use 512"),
    (
        "parallel.tp=2 train.seq_len=255 train.global_batch=1",
        "train.seq_len (255) times the 1 rows of a micro-batch must be a multiple of the 2 pieces in which parallel.cp "
        "(1) and parallel.tp (2) divide its tokens: use 256",
    ),
    (
        "engine=deepspeed optim=adamw train.dtype=float32 parallel.tp=2",
        "parallel.tp (2) is not built for engine=deepspeed",
    ),
    (
        "engine=deepspeed optim=adamw train.dtype=float32 parallel.fsdp=true",
        "parallel.fsdp (True) is not for engine=deepspeed, which has ZeRO for it: use engine=native",
    ),
    ("parallel.fsdp=true parallel.tp=2", "parallel.fsdp (True) can not divide matrices that tensor parallelism"),
    ("parallel.fsdp=true parallel.pp=2 parallel.ep=1 train.micro_batch=4", "which parallel.fsdp spreads"),
    (
        "parallel.fsdp=true model.width=129 moe.width=129",
        "model.width (129) must be a multiple of the 2 ranks over which parallel.fsdp cuts a dense SwiGLU's columns: "
        "use 130",
    ),
    (
        "nproc=4 parallel.fsdp=true parallel.exchange_rows=64",
        "parallel.exchange_rows (64) may make more rounds on some of the 2 ranks among which parallel.fsdp divides an "
        "expert: use null, or parallel.fsdp=false",
    ),
    ("parallel.timeout=0", "parallel.timeout (0.0) must be positive"),
    ("nproc=1", "parallel.ep (2) must divide the data-parallel ranks (1)"),
    ("nproc=0", "nproc (0) must be at least 1"),
    ("nproc=two", "nproc ('two') must be a whole number or null"),
    ("run=", "run ('') must name a directory"),
    ("train.steps=10", "train.steps (10) and train.seconds (180.0) are two ways to end a run"),
    ("train.seconds=null", "exactly one must be set"),
    ("train.seconds=-1", "train.seconds (-1.0) must be positive"),
    ("train.global_batch=7", "train.global_batch (7) must be a multiple of the 2 data-parallel ranks: use 6"),
    ("train.micro_batch=3", "train.micro_batch (3) must divide the 4 rows of a rank"),
    ("train.seq_len=2048", "train.seq_len (2048) can not exceed model.max_seq_len (1024)"),
    ("train.seq_len=1", "train.seq_len (1) must be at least 2"),
    ("train.save_every=0", "train.save_every (0) must be at least 1"),
    ("train.dtype=float8", "train.dtype ('float8') must be one of bfloat16, float16, float32"),
    ("train.save_failures=-1", "train.save_failures (-1) must not be negative"),
    ("train.async_save=2", "train.async_save (2) must be true or false"),
    ("train.resume=maybe", "train.resume (maybe) is not a directory"),
    ("train.resume=true", "train.resume (true) needs a run to resume"),
    ("train.init=x train.resume=y", "train.init (x) can not be combined with train.resume (y)"),
    ("optim.lr=0", "optim.lr (0.0) must be positive"),
    ("optim.name=sgd", "optim.name ('sgd') must be one of adamw, muon, adafactor"),
    ("optim.beta1=1", "optim.beta1 (1.0) must lie in [0, 1)"),
    ("optim.warmup=2", "optim.warmup (2.0) must lie in [0, 1)"),
    (
        "optim=adafactor optim.state_dtype=bfloat16",
        "optim.state_dtype (bfloat16) is not built for optim.name=adafactor",
    ),
    ("optim.clip=-1", "optim.clip (-1.0) must be positive"),
    ("engine=fsdp", "engine ('fsdp') must be one of native, deepspeed"),
    ("engine=deepspeed", "optim.name (muon) is not built for engine=deepspeed"),
    ("engine=deepspeed optim=adafactor", "optim.name (adafactor) is not built for engine=deepspeed (ZeRO shards flat"),
    (
        "engine=deepspeed optim=adamw optim.state_dtype=bfloat16",
        "optim.state_dtype (bfloat16) is not built for engine=",
    ),
    (
        "engine=deepspeed optim=adamw parallel.zero=3 parallel.ep=2",
        "parallel.ep (2) gives ranks experts of their own, and parallel.zero=3 cuts what all ranks hold: use "
        "parallel.zero=2, or engine=native parallel.fsdp=true",
    ),
    (
        "engine=deepspeed optim=adamw parallel.zero=3 parallel.ep=1 train.compile=true",
        "train.compile (True) is not built for parallel.zero=3",
    ),
    ("parallel.zero=2", "parallel.zero (2) is read by engine=deepspeed only: use engine=deepspeed"),
    (
        "engine=deepspeed optim=adamw train.dtype=float16",
        "train.dtype (float16) is not built for engine=deepspeed (the loss is scaled",
    ),
    (
        "engine=deepspeed optim=adamw train.dtype=float32 parallel.ep=1 nproc=1",
        "engine (deepspeed) needs at least 2 ranks",
    ),
    ("seed=-1", "seed (-1) must lie in [0, 2**63)"),
    ("log.every=0", "log.every (0) must be at least 1"),
    ("train.steps=${nowhere}", "nowhere"),
    ("seed=1,2", "'seed=1,2' is a sweep: use -m"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[words for words, _ in BAD])
def test_a_bad_configuration_is_one_line_and_exit_code_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "experiment=switch_pydocs", *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir()), "a refused run leaves nothing behind"


def test_there_are_at_least_forty_of_them():
    assert len(BAD) >= 40


def test_a_refusal_never_imports_torch():
    code = (
        "import sys; from turnout.launch.main import main; "
        "code = main(['train', 'experiment=switch_pydocs', 'moe.num_experts=7']); "
        "assert 'torch' not in sys.modules, 'torch was imported'; sys.exit(code)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2, result.stderr
    assert "parallel.ep (2) must divide moe.num_experts (7)" in result.stderr


def test_a_later_word_overrides_a_group_s_and_an_experiment_s_value():
    config = compose(["experiment=switch_pydocs", "optim.lr=0.5", "train.seconds=null", "train.steps=3"]).config
    assert (config.optim.lr, config.train.steps, config.train.seconds) == (0.5, 3, None)


def test_a_dense_model_is_one_word():
    assert compose(["model.moe=null", "nproc=2"]).config.model.moe is None


def test_settings_within_settings_have_names_of_their_own():
    words = ["model.attention.window=8", "model.rope.kind=yarn", "model.rope.factor=4", "data.spans.density=0.2"]
    config = compose(["model=tiny", "model.encoder.layers=1", *words, "data.spans.sentinels=20"]).config
    assert config.model.attention.window == 8
    assert (config.model.rope.kind, config.model.rope.factor) == ("yarn", 4.0)
    assert (config.model.encoder.layers, config.data.spans.density) == (1, 0.2)


def test_the_frozen_form_of_a_run_is_the_run():
    config = compose(["experiment=gshard_pydocs"]).config
    assert build(RunConfig, to_dict(config)) == config


@pytest.mark.parametrize(("until", "same"), [(1.0, True), (0.5, False)])
def test_a_run_of_timed_sources_keeps_its_steps_on_resume(until, same):
    mix = f"data.mix=[{{path: pydocs, weight: 1, until: {until}}}, {{path: pydocs, weight: 1}}]"
    words = ["experiment=switch_pydocs", "train.seconds=null", mix]
    short, long = (identity(to_dict(compose([*words, f"train.steps={steps}"]).config)) for steps in (10, 20))
    assert (short == long) is same


def test_trace_and_replay_are_the_run_s_and_change_nothing_that_a_resumed_run_must_share():
    plain = compose(["experiment=switch_pydocs"]).config
    traced = compose(["experiment=switch_pydocs", "moe.trace=true", "moe.replay=runs/a"]).config
    assert (plain.trace, plain.replay, traced.trace, traced.replay) == (False, None, True, "runs/a")
    assert traced.model == plain.model
    assert identity(to_dict(traced)) == identity(to_dict(plain))
    assert build(RunConfig, to_dict(traced)) == traced


def test_under_torchrun_the_world_decides():
    assert compose(["nproc=null"], world=4).world == 4
    with pytest.raises(ConfigError, match=r"train\.global_batch \(8\)"):
        compose([], world=3)
