"""`parallel=auto`: the fastest layout that fits, frozen with every size said; what is given stays."""

import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from turnout import ConfigError
from turnout.configs.hardware import ACCELERATORS, NETWORKS
from turnout.launch.auto import Machines, detect, gpus
from turnout.launch.compose import compose
from turnout.launch.layouts import layouts
from turnout.launch.train import merge
from turnout.tests.helpers.runs import corpus, run, tiny

H100 = Machines(accelerator=ACCELERATORS["H100"], network=NETWORKS["ib400"], words="H100, ib400")
BIG = [
    "model.layers=16", "model.width=2048", "model.heads=16", "model.kv_heads=8", "model.head_dim=128", "moe=olmoe",
    "moe.num_experts=64", "moe.expert_width=1024", "moe.top_k=8", "data.vocab_size=50000", "train.seq_len=1024",
    "train.global_batch=256", "train.micro_batch=4",
]  # fmt: skip


def auto(world, *words, machines=H100):
    return compose(["parallel=auto", *words], world, machines=machines)


def with_memory(size):
    return replace(H100, accelerator=replace(H100.accelerator, memory=size))


def test_the_pick_is_the_fastest_that_fits_and_says_every_size():
    composed = auto(8, *BIG)
    parallel, layout = composed.config.parallel, composed.config.layout(8)
    assert (parallel.dp, parallel.tp, parallel.ep) == (layout.dp, layout.tp, layout.ep)
    every = list(layouts(composed.config, 8, H100.accelerator, H100.network))
    fitting = [forecast for forecast in every if forecast.fits]
    assert 0 < len(fitting) < len(every) == composed.choice.tried
    best = min(fitting, key=lambda forecast: forecast.seconds)
    assert best.layout == layout
    assert composed.choice.picked[0].seconds == best.seconds
    shown = list(composed.choice.lines())
    assert f"{composed.choice.tried} layouts, {len(fitting)} fit" in shown[1]
    assert len(shown) == 3 + min(5, len(fitting))


def test_less_memory_spreads_more():
    roomy, tight = auto(8, *BIG, machines=with_memory(1e12)), auto(8, *BIG, machines=with_memory(40e9))
    assert tight.choice.picked[0].seconds > roomy.choice.picked[0].seconds
    assert tight.choice.picked[0].memory.total <= 40e9 < roomy.choice.picked[0].memory.total


def test_what_is_given_stays():
    assert auto(8, *BIG, "parallel.tp=2").config.parallel.tp == 2
    found = auto(8, *BIG, "parallel.ep=2", "parallel.pp=2").config
    assert (found.parallel.ep, found.parallel.pp) == (2, 2)
    assert auto(8, *BIG, "parallel.dp=4").config.layout(8).dp == 4
    # an experiment's own layout is not given by the command line
    assert auto(8, "experiment=switch_pydocs").choice.tried > 3


def test_memory_for_time_only_when_nothing_fits_and_it_is_not_given():
    assert auto(2, *BIG).config.train.recompute == "none"
    config = compose(BIG, 2).config
    least = min(forecast.memory.total for forecast in layouts(config, 2, H100.accelerator, H100.network))
    tight = with_memory(0.98 * least)
    found = auto(2, *BIG, machines=tight).config.train
    assert (found.recompute, found.micro_batch) == ("selective", 4)
    with pytest.raises(ConfigError, match=r"finds no layout of 2 ranks that fits: the smallest takes .* of .* GiB"):
        auto(2, *BIG, "train.recompute=none", machines=tight)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["parallel.tp=3"], "parallel.tp .3. must fit the ranks"),
        (["train.global_batch=255"], r"train\.global_batch \(255\)"),
    ],
)
def test_what_no_layout_can_do_is_refused_by_name(words, message):
    with pytest.raises(ConfigError, match=message):
        auto(8, *BIG, *words)


def test_machines_are_known_by_their_name(tmp_path):
    for number, name in enumerate(["NVIDIA H200", "NVIDIA H200"]):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "information").write_text(f"Model: \t\t {name}\nIRQ: 7\n")
    found = detect(4, gpus(tmp_path))
    assert (found.accelerator.memory, found.accelerator.node) == (141e9, 2)
    assert found.words == "NVIDIA H200 (H200), 2 a node, ib400"
    assert detect(1, ["NVIDIA A100-SXM4-40GB"]).accelerator.memory == 40e9
    assert "taken for H100" in detect(1, ["NVIDIA Z9"]).words
    alone, shared = detect(1, []).accelerator, detect(4, []).accelerator
    assert alone.cpu
    assert alone.memory == 4 * shared.memory > 1e9


@pytest.mark.full
def test_a_run_says_what_it_chose_and_freezes_it(tmp_path):
    words = tiny(corpus(tmp_path), "train.steps=1", "parallel=auto", f"run={tmp_path / 'run'}")
    ended = run("-m", "turnout", "train", *merge(words, ["nproc=2"]))
    assert ended.returncode == 0, ended.stdout
    frozen = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["parallel"]
    assert frozen["dp"] * frozen["tp"] * frozen["pp"] * frozen["cp"] == 2
    assert ended.stdout.count("the fastest is taken") == 1
    assert ended.stdout.count("rank  node") == 1
    code = "from turnout.launch.compose import compose; compose(['parallel=auto', 'nproc=4']); import sys"
    lean = [sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"]
    assert subprocess.run(lean, check=False).returncode == 0
