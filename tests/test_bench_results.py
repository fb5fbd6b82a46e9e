"""Results on disk: what was saved is what is loaded, and a file is whole or not there."""

import json
import os
from pathlib import Path
from statistics import median, quantiles

import pytest

from bench import results
from bench.results import Results, merged
from made_results import CASES, made_results


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_saved_is_loaded(device: str, tmp_path: Path) -> None:
    saved = made_results(0, device)
    saved.measurements[0].not_captured = 'it is 12 µs | "quoted"\nand of two lines'
    for one in saved.measurements:  # as many digits as are kept
        one.seconds = {m: [[float(f"{t:.5g}") for t in turns] for turns in runs] for m, runs in one.seconds.items()}
    results.save(saved, tmp_path / "new folder" / "results.json")
    assert results.load(tmp_path / "new folder" / "results.json") == saved


def test_times_keep_five_digits(tmp_path: Path) -> None:
    saved = made_results(0)
    results.save(saved, tmp_path / "results.json")
    for one, other in zip(saved.measurements, results.load(tmp_path / "results.json").measurements, strict=True):
        assert one.runs() == pytest.approx(other.runs(), rel=1e-4)


def test_a_measurement_is_a_line(tmp_path: Path) -> None:
    saved = made_results(0)
    results.save(saved, tmp_path / "results.json")
    lines = [line for line in (tmp_path / "results.json").read_text().splitlines() if '"contender"' in line]
    assert len(lines) == len(saved.measurements)
    assert json.loads(lines[0].rstrip(","))["contender"] == saved.measurements[0].contender


def test_nothing_measured_is_saved_too(tmp_path: Path) -> None:
    results.save(Results("CPU"), tmp_path / "results.json")
    assert results.load(tmp_path / "results.json") == Results("CPU")


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    results.save(made_results(0, cases=CASES[:1]), path)
    before = path.read_text()

    def half(self: Path, text: str) -> int:
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            results.save(made_results(1), path)
    assert path.read_text() == before
    results.save(made_results(1), path)  # over what the interrupted one left
    assert len(results.load(path).measurements) == len(made_results(1).measurements)
    assert os.listdir(tmp_path) == ["results.json"]


def test_the_copy_is_a_share_of_itself() -> None:
    """It reads and writes, whatever the case moves."""
    found = made_results(0, "cuda")
    for case in CASES:
        one = found.of(case)["copy"]
        figure = found.figure(one)
        assert figure is not None
        assert figure.middle == pytest.approx(200 * case.matrix_bytes / one.runs()[0] / found.ceilings["copy"])


def test_a_figure_is_the_median_of_the_runs_and_its_noise_their_range() -> None:
    found = made_results(0)
    one, eager = found.of(CASES[0])["softxent"], found.of(CASES[0])["eager"]
    ratios = [median(a) / median(b) for a, b in zip(one.seconds["calls"], eager.seconds["calls"], strict=True)]
    assert len(ratios) == 5 and found.ratios(one) == ratios
    assert found.figure(one) == (min(ratios), median(ratios), max(ratios))
    assert found.ratios(one, "graph") == [] and found.figure(found.of(CASES[-1])["softxent-inplace"]) is None


def test_the_figure_of_one_run_has_the_quartiles_of_its_turns() -> None:
    found = made_results(0, "cuda")
    one = found.of(CASES[0])["softxent"]
    turns = [*(one.seconds["graph"][0]), one.runs()[0]]
    at_best = 100 * one.least_bytes / found.ceilings["copy"]
    low, _, high = quantiles([at_best / t for t in one.seconds["graph"][0]], n=4)
    assert found.figure(one) == pytest.approx((low, at_best / turns[-1], high))


def test_the_limit_is_a_copy_of_the_least_bytes() -> None:
    """On a CPU as a ratio to eager's time; forward, which only reads, half of what a copy takes."""
    found = made_results(0)
    step, forward = CASES[1], CASES[-2 + 1]
    for case, share in ((step, 1.0), (forward, 0.5)):
        copy = median(found.ratios(found.of(case)["copy"]))
        assert found.limit(case) == pytest.approx(share * copy, rel=1e-3)


def test_who_is_wrong_in_one_run_has_no_time() -> None:
    a, b = made_results(0, n_runs=1), made_results(1, n_runs=1)
    wrong = b.of(CASES[0])["softxent"]
    wrong.error, wrong.seconds = "the loss is 3 where 2 is right", {}
    got = merged([a, b]).of(CASES[0])
    assert got["softxent"].error and not got["softxent"].seconds
    assert len(got["eager"].runs()) == 2
