"""The YAML groups: every option composes, holds only what its dataclass knows, and travels with the package."""

from importlib import resources

import pytest
import yaml

from turnout.configs.schema import MISSING, defaults, known_keys
from turnout.launch.compose import CONFIGS, GROUPS, ROOT_KEYS, compose
from turnout.moe.config import ModelConfig
from turnout.moe.train.config import TrainConfig

OPTIONS = [(path.parent.name, path.stem) for path in sorted(CONFIGS.glob("*/*.yaml"))]
EXPERIMENTS = [name for group, name in OPTIONS if group == "experiment"]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_composes_into_a_valid_run(group, option):
    words = [f"{group}={option}"] + (["nproc=1"] if group != "experiment" else [])
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
