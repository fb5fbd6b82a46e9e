"""Pictures whose colours say something."""

from pathlib import Path

import numpy as np

from fmnist import plots


def test_templates_are_red_where_a_pixel_speaks_for_the_class_and_blue_where_against(tmp_path: Path) -> None:
    from matplotlib import image

    weight = np.zeros((10, 784), np.float32)
    weight[0], weight[9] = 0.5, -0.5  # the first and the last image are of one colour each
    plots.templates(weight, tmp_path / "templates.png")
    pixels = image.imread(tmp_path / "templates.png")[..., :3]
    red = (pixels[..., 0] > 0.3) & (pixels[..., 1:].max(-1) < 0.15)
    blue = (pixels[..., 2] > 0.3) & (pixels[..., 0] < 0.1)
    least = 0.01 * red.size
    assert red.sum() > least and blue.sum() > least
    assert np.argwhere(red)[:, 0].mean() < np.argwhere(blue)[:, 0].mean()


def test_weights_of_zero_are_white(tmp_path: Path) -> None:
    from matplotlib import image

    plots.templates(np.zeros((10, 784), np.float32), tmp_path / "templates.png")
    pixels = image.imread(tmp_path / "templates.png")[:, : 2 * 1200 // 3, :3]  # left of the scale, which has colours
    assert (pixels.max(-1) - pixels.min(-1)).max() < 0.05
