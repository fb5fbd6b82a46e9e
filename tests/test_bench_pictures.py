"""Pictures of results: which, of whom, of what size."""

import sys
from pathlib import Path

import pytest

from bench import contenders
from bench.pictures import LOOKS, MEMORY, RATIO, SPEED, draw, lines_of, pictures
from bench.results import Results
from made_results import CASES, made_results

pytest.importorskip("matplotlib")


@pytest.mark.parametrize(("device", "first"), [("cuda", "speed"), ("cpu", "ratio")])
def test_the_files_are_there_and_small(device: str, first: str, tmp_path: Path) -> None:
    paths = pictures(made_results(0, device), tmp_path / "new folder")
    assert [path.name for path in paths] == [f"{first}-cross-entropy.png", "memory-cross-entropy.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000


def test_a_line_is_what_was_measured_and_a_gap_what_was_not() -> None:
    found = made_results(0, "cuda")
    wrong = found.of(CASES[0])["quack"]
    wrong.error, wrong.seconds = "the loss is 3 where 2 is right", {}
    lines = dict(lines_of(found, "cross_entropy", SPEED))["step", "bfloat16"]
    assert lines["quack"][10] is None
    one = found.of(CASES[1])["quack"]
    share = found.share_of_copy(one)
    middle = lines["quack"][128256]
    assert share is not None and middle is not None
    assert middle[0] <= middle[1] <= middle[2]
    assert middle[1] == pytest.approx(100 * share, rel=1e-3)  # of an even number of turns, medians differ
    assert "copy" not in lines


def test_ratios_and_memory_are_multiples() -> None:
    found = made_results(0)
    ratio = dict(lines_of(found, "cross_entropy", RATIO))["step", "bfloat16"]["eager"][10]
    memory = dict(lines_of(found, "cross_entropy", MEMORY))["step", "bfloat16"]["quack"][10]
    assert ratio == (1, 1, 1)
    assert memory == pytest.approx((1.3, 1.3, 1.3), abs=1e-3)


def test_a_picture_has_units_a_legend_and_the_device() -> None:
    figure = draw(made_results(0, "cuda"), "cross_entropy", SPEED)
    assert [axes.get_title() for axes in figure.axes] == [
        "forward + backward, bfloat16",
        "forward + backward, float32",
        "forward alone, bfloat16",
        "forward alone, float32",
    ]
    assert figure.axes[0].get_ylabel() == "share of the copy's GB/s (%)"
    assert figure.axes[2].get_xlabel() == "width (columns of the logits)"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["softxent", "softxent-inplace", "eager", "quack"]
    assert figure.get_supxlabel() == "A GPU, torch 2.13.0, commit abc"


def test_a_contender_looks_like_itself_and_nobody_else() -> None:
    names = {name.removesuffix("-softmax") for name in contenders.REGISTRY}
    assert names <= set(LOOKS)
    for table in (contenders.CROSS_ENTROPY, contenders.SOFTMAX):
        looks = [LOOKS[name.removesuffix("-softmax")] for name in table]
        assert len(set(looks)) == len(looks)


def test_one_width_is_a_picture(tmp_path: Path) -> None:
    """Without a warning of matplotlib's, of which tests make errors."""
    assert len(pictures(made_results(0, cases=CASES[:1]), tmp_path)) == 2


def test_nothing_measured_is_no_picture(tmp_path: Path) -> None:
    assert pictures(Results("CPU"), tmp_path) == []


def test_without_matplotlib_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    said: list[str] = []
    assert pictures(made_results(0), tmp_path, said.append) == []
    assert said == ["no pictures: matplotlib is not installed"]
