"""The pictures of a run: a PNG with as many panels as there are MoE layers, and a faithful terminal rendering."""

import json
import re

import pytest
from matplotlib import image
from rich.console import Console

from turnout import DataError
from turnout.launch import plots
from turnout.launch.train import show


def write(directory, layers=(1, 3), steps=(10, 20, 30), experts=4, alarms=()):
    """A run whose expert 0 takes more and more of every layer, and whose last expert gets nothing."""
    lines = []
    for index, step in enumerate(steps):
        hot = 0.25 + 0.5 * index / len(steps)
        load = [hot, *[(1 - hot) / (experts - 2)] * (experts - 2), 0.0]
        by_layer = {
            "expert_load": load, "router_entropy": 1.0, "load_max_mean": hot * experts, "layer_drop_fraction": 0.1,
        }  # fmt: skip
        row = {"kind": "train", "step": step, "loss": 5.0 - index, "moe_layers": layers}
        lines.append({**row, **{name: [value] * len(layers) for name, value in by_layer.items()}})
    lines.append({"kind": "eval", "step": steps[-1], "val_loss": 3.5, "bits_per_byte": 2.0})
    lines += [{"kind": "alarm", "step": steps[-1], "layer": layer, "evenness": 0.0} for layer in alarms]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def black(pixels):
    """The share of the picture that is."""
    return float((pixels[..., :3].max(-1) < 0.02).mean())


def magenta(pixels):
    """The share of the picture that is, thin lines and letters included."""
    red, green, blue = (pixels[..., i] for i in range(3))
    return float(((red - green > 0.4) & (blue - green > 0.4)).mean())


@pytest.mark.parametrize(("layers", "experts"), [((), 4), ((1,), 4), ((1, 3), 8), (tuple(range(1, 24, 2)), 64)])
def test_the_picture_has_a_map_for_each_layer(tmp_path, layers, experts):
    path = plots.picture(write(tmp_path, layers, experts=experts))
    assert path == tmp_path / "plots.png"
    pixels = image.imread(path)
    assert pixels.std() > 0.05, "something is drawn"
    maps = pixels.shape[0] / 110 - (5.8 if layers else 3.6)
    rows = {0: 0, 1: 1, 2: 2, 12: 4}[len(layers)]
    assert maps == pytest.approx(rows and 0.8 + rows * (1.6 + 0.017 * experts), abs=0.05)


def test_the_picture_shows_dead_experts_in_black_and_a_collapse_in_magenta(tmp_path):
    quiet = image.imread(plots.picture(write(tmp_path)))
    alarmed = image.imread(plots.picture(write(tmp_path, alarms=(3,))))
    assert black(quiet) > 0.05, "one of 4 experts in both layers"
    assert magenta(quiet) == 0
    assert magenta(alarmed) > 5e-4
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace(" 0.0]", " 0.01]"))
    assert black(image.imread(plots.picture(tmp_path))) < black(quiet) / 2


def test_a_long_run_is_drawn_from_means_over_stretches(tmp_path):
    steps = tuple(range(1, 2002, 2))
    assert len(steps) > 2 * plots.COLUMNS
    assert plots.picture(write(tmp_path, steps=steps)).exists()


def test_the_sketch_shows_the_loss_falling_and_the_hot_expert_filling_up(tmp_path):
    console = Console(record=True, width=100)
    plots.sketch(write(tmp_path, (1,)), console)
    text = console.export_text()
    assert "loss 5.000 → 3.000" in text
    assert "█▄▁" in text or "█▅▁" in text
    assert re.search(r"0 ▒██\s+58\.3%", text), text
    assert re.search(r"3\s+0\.0%", text), text
    assert "layer 1 (even share 25.0%)" in text


def test_the_sketch_of_many_experts_fits_on_a_screen(tmp_path):
    console = Console(record=True, width=100)
    plots.sketch(write(tmp_path, tuple(range(12)), experts=64), console)
    lines = console.export_text().splitlines()
    assert len(lines) < 20
    assert re.match(r" 11 ▁.█\s+37\.33", lines[-1]), lines


def test_an_empty_or_torn_run_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        plots.picture(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        plots.picture(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no training rows"):
        plots.picture(tmp_path)


def test_a_picture_that_fails_never_fails_the_run(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    show(tmp_path)
    assert "plots.png could not be drawn" in capsys.readouterr().err
    write(tmp_path)
    show(tmp_path)
    assert (tmp_path / "plots.png").exists()


def test_resample_keeps_the_mean_of_every_stretch():
    assert plots.resample([1, 2, 3, 4], 2) == [1.5, 3.5]
    assert plots.resample([1, 2], 60) == [1, 2]
    assert len(plots.resample(list(range(1000)), 60)) == 60
