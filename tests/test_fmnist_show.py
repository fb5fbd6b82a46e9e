"""Images and their labels, on paper and in the terminal."""

from pathlib import Path

import numpy as np
import pytest

import fmnist.data
from fmnist import show
from fmnist.data import LABELS
from fmnist.errors import UserError
from fmnist_command import run


def test_the_grid_is_a_picture_of_the_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from matplotlib import image

    path = tmp_path / "grid.png"
    run(show, "--split", "test", "--start", "3", "--count", "10", "--output", str(path))
    pixels = image.imread(path)
    assert pixels.shape[1] > 2 * pixels.shape[0] > 400, "not two rows of eight"
    assert pixels.std() > 0.05, "an empty picture"
    assert "test images 3 to 12 of the embedded sample" in capsys.readouterr().out


def test_text_shows_each_image_over_its_label(capsys: pytest.CaptureFixture[str]) -> None:
    run(show, "--text", "--start", "5", "--count", "3")
    labels = fmnist.data.load("sample").train_labels[5:8]
    words = capsys.readouterr().out
    places = [words.index(LABELS[label]) for label in labels]
    assert len(set(places)) == len({*labels.tolist()}) and any(block in words for block in show.BLOCKS[1:])


def test_a_character_is_as_dark_as_its_pixels() -> None:
    image = np.zeros((1, 28, 28), np.uint8)
    image[0, :2, :3] = 255
    image[0, 2:4, 3] = 128
    lines = show.text(image, ["Bag"], shades=show.ASCII).splitlines()
    assert len(lines) == 15 and lines[0] == "###" and lines[1] == "   :" and lines[-1].strip() == "Bag"
    assert not any("".join(lines[2:14]))


def test_the_shades_share_the_grey_levels_evenly() -> None:
    drawn = [
        show.text(np.full((1, 2, 1), level, np.uint8), ["x"], shades="01234").splitlines()[0] for level in range(256)
    ]
    assert drawn == sorted(drawn) and all(drawn.count(shade) in (51, 52) for shade in "01234")


@pytest.mark.parametrize(("width", "beside"), [(28, 1), (57, 1), (58, 2), (88, 3), (5, 1)])
def test_as_many_images_beside_each_other_as_fit(width: int, beside: int) -> None:
    images = np.full((7, 28, 28), 255, np.uint8)
    lines = show.text(images, ["Bag"] * 7, width).splitlines()
    assert len(lines[0]) == beside * 28 + (beside - 1) * show.GAP
    assert sum(line.count("Bag") for line in lines) == 7


def test_a_terminal_without_blocks_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        encoding = "ascii"

    monkeypatch.setattr("sys.stdout", Terminal())
    assert show._shades() == show.ASCII
    Terminal.encoding = "utf-8"
    assert show._shades() == show.BLOCKS


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--count 0", "--count 0"),
        ("--count -1 --text", "at least one"),
        ("--start -1", "--start -1"),
        ("--start 1999 --count 2", "0 to 1999"),
        ("--split test --start 500 --text", "0 to 499"),
        ("--output /nonexistent/a.png", "cannot write /nonexistent/a.png"),
        ("--output /tmp/a.nokind", "cannot write /tmp/a.nokind"),
        ("--output /tmp", "cannot write /tmp: its name must end in"),
    ],
)
def test_what_cannot_be_shown_is_said(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(show, *options.split())
