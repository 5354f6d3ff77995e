"""The picture of a scan shows every layer's curve."""

import pytest
from matplotlib.image import imread

from turnout.launch.sensitivity_plot import draw
from turnout.moe.compress.sensitivity import Scan


@pytest.mark.parametrize("layers", [1, 30])
def test_every_layer_has_a_colour_of_its_own(tmp_path, layers):
    found = Scan(10.0, (0.3, 0.6), {f"blocks.{i}": (0.1 * i - 0.2, 4.0 + i) for i in range(layers)})
    image = imread(draw(found, tmp_path / "scan.png"))[..., :3]
    shades = {tuple(pixel) for pixel in (image.reshape(-1, 3) * 255).astype(int).tolist()}
    colourful = {shade for shade in shades if max(shade) - min(shade) > 40}
    assert len(colourful) >= layers
