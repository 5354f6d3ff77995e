"""The pictures of a run: a PNG with as many panels as there are MoE layers, and a faithful terminal rendering."""

import json
import re

import pytest
from matplotlib import image
from rich.console import Console

from turnout import DataError
from turnout.launch import plots


def write(directory, layers=(1, 3), steps=(10, 20, 30)):
    lines = []
    for index, step in enumerate(steps):
        hot = 0.25 + 0.25 * index
        load = [[hot, *[(1 - hot) / 3] * 3] for _ in layers]
        lines.append({"kind": "train", "step": step, "loss": 5.0 - index, "moe_layers": layers, "expert_load": load})
    lines.append({"kind": "eval", "step": steps[-1], "val_loss": 3.5, "bits_per_byte": 2.0})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


@pytest.mark.parametrize("layers", [(), (1,), (1, 3)], ids=len)
def test_the_picture_has_a_panel_for_the_loss_and_each_layer(tmp_path, layers):
    path = plots.picture(write(tmp_path, layers))
    assert path == tmp_path / "plots.png"
    pixels = image.imread(path)
    assert pixels.shape[0] == pytest.approx((3 + 1.8 * len(layers)) * 120, abs=2)
    assert pixels.std() > 0.05, "something is drawn"


def test_the_sketch_shows_the_loss_falling_and_the_hot_expert_filling_up(tmp_path):
    console = Console(record=True, width=100)
    plots.sketch(write(tmp_path, (1,)), console)
    text = console.export_text()
    assert "loss 5.000 → 3.000" in text
    assert "█▄▁" in text or "█▅▁" in text
    assert re.search(r"0 ▒██\s+75\.0%", text), text
    assert "layer 1 (even share 25.0%)" in text


def test_an_empty_or_torn_run_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        plots.picture(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"metrics\.jsonl"):
        plots.picture(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no training rows"):
        plots.picture(tmp_path)


def test_resample_keeps_the_mean_of_every_stretch():
    assert plots.resample([1, 2, 3, 4], 2) == [1.5, 3.5]
    assert plots.resample([1, 2], 60) == [1, 2]
    assert len(plots.resample(list(range(1000)), 60)) == 60
