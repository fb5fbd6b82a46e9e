"""Pictures of results: which, of whom, of what size, and nothing hidden."""

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench import contenders
from bench.cases import Case
from bench.pictures import LOOKS, MEMORY, RATIO, SPEED, draw, pictures
from bench.results import Results
from made_results import CASES, made_results
from made_results import SPEED as RELATIVE

pytest.importorskip("matplotlib")
SMALL = Case("cross_entropy", 256, 10, "bfloat16", "step")


def points(axes: Any) -> dict[str, list[tuple[float, float]]]:
    """By contender's colour: where its points are."""
    return {box.lines[0].get_color(): [tuple(p) for p in box.lines[0].get_xydata()] for box in axes.containers}


@pytest.mark.parametrize(("device", "first"), [("cuda", "speed"), ("cpu", "ratio")])
def test_the_files_are_there_and_small(device: str, first: str, tmp_path: Path) -> None:
    paths = pictures(made_results(0, device), tmp_path / "new folder")
    assert [path.name for path in paths] == [f"{first}-cross-entropy.png", "memory-cross-entropy.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 150_000


def test_a_point_is_what_was_measured_and_a_gap_what_was_not() -> None:
    found = made_results(0, "cuda")
    wrong = found.of(CASES[0])["quack"]
    wrong.error, wrong.seconds = "the loss is 3 where 2 is right", {}
    quack = points(draw(found, "cross_entropy", SPEED).axes[0])[LOOKS["quack"][0]]
    share = found.figure(found.of(CASES[1])["quack"])
    assert share and len(quack) == 1 and quack[0][1] == pytest.approx(share.middle)
    ratios = points(draw(made_results(0), "cross_entropy", RATIO).axes[0])
    assert {y for _, y in ratios[LOOKS["eager"][0]]} == {1.0}
    memory = points(draw(found, "cross_entropy", MEMORY).axes[0])
    assert [y for _, y in memory[LOOKS["softxent-inplace"][0]]] == pytest.approx([RELATIVE["softxent-inplace"]] * 2)


def test_no_point_lies_on_another() -> None:
    """Even where all figures are the same: each has a place of its own in its column."""
    found = made_results(0)
    for one in found.measurements:
        one.peak_bytes = one.case.matrix_bytes
    places = sorted(x for line in points(draw(found, "cross_entropy", MEMORY).axes[0]).values() for x, _ in line)
    assert len(places) == 2 * 4 and all(b - a > 0.15 for a, b in pairwise(places))


def test_small_shapes_come_first_and_every_column_has_its_limit() -> None:
    found = made_results(0, cases=(*CASES, SMALL))
    axes = draw(found, "cross_entropy", RATIO).axes[0]
    assert [text.get_text() for text in axes.get_xticklabels()] == ["256\nx 10", "10", "128k"]
    limits = [line.get_ydata()[0] for line in axes.lines if line.get_linewidth() == 4]
    assert limits == [found.limit(case) for case in (SMALL, CASES[0], CASES[1])]


def test_a_picture_says_what_is_better_and_has_units_a_legend_and_the_device() -> None:
    figure = draw(made_results(0, "cuda"), "cross_entropy", SPEED)
    assert [axes.get_title() for axes in figure.axes] == [
        "forward + backward, bfloat16",
        "forward + backward, float32",
        "forward alone, bfloat16",
        "forward alone, float32",
    ]
    assert "higher is better" in figure.get_suptitle() and figure.axes[0].get_ylabel() == "% of the copy's GB/s"
    for picture in (RATIO, MEMORY):
        assert "lower is better" in picture.title
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == [
        *("softxent", "softxent-inplace", "eager", "quack", "limit")
    ]
    assert legend.get_title().get_text() == "A GPU, torch 2.13.0, commit abc"


def test_a_contender_looks_like_itself_and_nobody_else() -> None:
    assert set(contenders.REGISTRY) == set(LOOKS) and len(set(LOOKS.values())) == len(LOOKS)


def test_one_width_is_a_picture_and_nothing_measured_is_none(tmp_path: Path) -> None:
    """Without a warning of matplotlib's, of which tests make errors."""
    assert len(pictures(made_results(0, cases=CASES[:1]), tmp_path)) == 2
    assert pictures(Results("CPU"), tmp_path) == []


def test_without_matplotlib_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert pictures(made_results(0), tmp_path) == []
    assert capsys.readouterr().out == "no pictures: matplotlib is not installed\n"
