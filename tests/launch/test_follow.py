"""`train.init`: architecture and tokenizer come from the checkpoint, and what contradicts it is refused."""

import json

import pytest

from turnout import ConfigError
from turnout.launch.compose import compose
from turnout.moe.families.reading import open_source, whole_shapes
from turnout.moe.families.upcycle import Upcycled
from turnout.moe.models.store import load_config, load_model, save_model
from turnout.moe.quantization_config import QuantizationConfig
from turnout.moe.upcycle_config import UpcycleConfig
from turnout.tests.helpers.llama import llama
from turnout.tests.helpers.rounded import rounded

SHORT = "train.seq_len=32"


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return llama(tmp_path_factory.mktemp("dense") / "llama")


@pytest.fixture(scope="module")
def sparse(dense, tmp_path_factory):
    with open_source(dense) as source:
        made = Upcycled(source, UpcycleConfig(num_experts=4, top_k=2))
        tensors = {name: made.read(name) for name in whole_shapes(made.cfg)}
    return save_model(tmp_path_factory.mktemp("sparse") / "model", made.cfg, tensors, dense)


def test_what_nobody_said_follows_the_checkpoint(dense):
    config = compose([f"train.init={dense}", SHORT]).config
    assert config.model == load_config(dense)
    assert config.data.tokenizer == str(dense)
    assert config.data.vocab_size == config.model.vocab_size


def test_what_was_said_may_agree(dense, sparse):
    words = [f"train.init={dense}", SHORT, "model.width=32", "model.layers=4", f"data.tokenizer={sparse}"]
    assert compose(words).config.model == load_config(dense)


def test_upcycling_makes_the_model_sparse_and_training_s_settings_stay_free(dense):
    words = [f"train.init={dense}", SHORT, "upcycle.num_experts=8", "upcycle.granularity=2", "upcycle.every=4"]
    config = compose([*words, "moe.balance_loss=0.05", "moe.capacity_factor=2.0", "moe.trace=true"]).config
    moe = config.model.moe
    assert (moe.num_experts, moe.top_k, moe.expert_width, config.model.moe_layers) == (8, 4, 24, (3,))
    assert (moe.balance_loss, moe.capacity_factor, moe.eval_capacity_factor) == (0.05, 2.0, None)
    assert (moe.router, moe.renormalize, config.trace) == ("topk_softmax", True, True)


def test_a_sparse_checkpoint_keeps_its_experts_whatever_the_default_group_says(sparse):
    config = compose([f"train.init={sparse}", SHORT, "moe.z_loss=0.0"]).config
    theirs = load_config(sparse)
    assert config.model.moe.z_loss == 0 != theirs.moe.z_loss
    assert (config.model.moe.num_experts, config.model.moe.router) == (4, "topk_softmax")
    assert config.model.moe_layers == theirs.moe_layers == (1, 3)


CONTRADICTIONS = [
    ("dense", "model.width=64", "model.width (64) contradicts train.init ({path}), which has 32"),
    ("dense", "model=tiny", "model.layers (2) contradicts train.init ({path}), which has 4"),
    ("dense", "model=small", "model.width (192) contradicts train.init ({path}), which has 32"),
    ("dense", "data.vocab_size=999", "data.vocab_size (999) contradicts train.init ({path}), which has "),
    ("dense", "moe.num_experts=4", "moe.num_experts (4) is said of experts, and train.init ({path}) is dense"),
    ("dense", "upcycle.num_experts=4 moe.num_experts=8", "moe.num_experts (8) contradicts train.init ({path})"),
    ("dense", "upcycle.num_experts=4 model.moe=null", "model.moe (null) and train.init ({path}) has experts"),
    ("dense", "upcycle.num_experts=6 upcycle.granularity=5", "upcycle.num_experts (6) must be a multiple"),
    ("sparse", "moe.top_k=1", "moe.top_k (1) contradicts train.init ({path}), which has 2"),
    ("sparse", "moe=switch", "moe.router (switch) contradicts train.init ({path})"),
    ("sparse", "upcycle.num_experts=4", "model.moe (set) is in the model already"),
    ("sparse", "experiment=switch_pydocs", "model.ffn_width (256) contradicts train.init ({path}), which has 48"),
]


@pytest.mark.parametrize(("which", "words", "message"), CONTRADICTIONS, ids=lambda value: str(value)[:40])
def test_contradictions_are_refused_naming_both(dense, sparse, which, words, message):
    path = {"dense": dense, "sparse": sparse}[which]
    with pytest.raises(ConfigError) as caught:
        compose([f"train.init={path}", SHORT, *words.split()])
    assert str(caught.value).startswith(message.format(path=path))


def test_another_tokenizer_is_refused(dense, tmp_path):
    data = json.loads((dense / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**data, "version": "other"}))
    with pytest.raises(ConfigError, match=r"data\.tokenizer \(.*\) is not the tokenizer of train\.init"):
        compose([f"train.init={dense}", SHORT, f"data.tokenizer={tmp_path}"])


def test_a_place_without_a_model_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.init \(.*\) must be a model: .* holds no model"):
        compose([f"train.init={tmp_path}"])


def test_rounded_weights_are_refused_for_they_have_no_gradient(dense, tmp_path):
    model = rounded(load_model(dense), QuantizationConfig())
    path = save_model(tmp_path / "slim", model.cfg, model.state_dict(), dense)
    with pytest.raises(ConfigError, match=r"model\.quantization .* is how a compressed model is stored, and training"):
        compose([f"train.init={path}", SHORT])


def test_upcycling_needs_something_to_start_from():
    with pytest.raises(ConfigError, match=r"upcycle\.num_experts \(8\) makes a checkpoint sparse, and train\.init"):
        compose(["upcycle.num_experts=8"])


def test_a_run_may_name_where_it_began_when_it_goes_on_but_not_two_beginnings(dense):
    assert compose([f"train.init={dense}", SHORT, "train.resume=true"]).config.train.resume is True
    with pytest.raises(ConfigError, match=r"train\.init \(.*\) can not be combined with train\.resume \(elsewhere\)"):
        compose([f"train.init={dense}", SHORT, "train.resume=elsewhere"])
