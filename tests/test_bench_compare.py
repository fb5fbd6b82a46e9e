"""Two versions side by side: what is slower is found, noise is not, and what is not known is not claimed."""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import paired, results
from bench.cases import Case
from bench.command import main
from bench.compare import Change, check_comparable, compare, interval, judge, regressed, report, verdict
from bench.results import BadInput, Measurement, Results
from made_results import CASES, made_results

CASE = CASES[0]


def slowed(found: Results, factor: float, contender: str = "softxent", *cases: Case) -> Results:
    for one in found.measurements:
        if one.contender == contender and one.case in (cases or CASES):
            one.seconds = {
                method: [[factor * t for t in turns] for turns in runs] for method, runs in one.seconds.items()
            }
    return found


def verdicts(changes: list[Change], contender: str = "softxent", figure: str = "calls") -> dict[Case, str]:
    return {c.case: c.verdict for c in changes if c.contender == contender and c.figure in (figure, "")}


def measurement(found: Results, contender: str, case: Case = CASE) -> Measurement:
    return found.of(case)[contender]


def line(*cells: object) -> str:
    """Of a table in a report, without the spaces that align it."""
    return "|".join(map(str, cells))


def told(changes: list[Change], a: Results, b: Results, full: bool = False) -> str:
    text = report(changes, a, b, full=full)
    return "\n".join("|".join(cell.strip() for cell in row.split("|")).strip("|") for row in text.splitlines())


def test_a_planted_slowdown_is_found_and_the_same_code_is_no_slower() -> None:
    """All intervals hold together at 95 %: of 20 comparisons some two may err. Or it is too noisy to tell."""
    wrong = known = 0
    for seed in range(20):
        a, b = (made_results(seed + offset, n_turns=20, n_runs=10) for offset in (0, 1000))
        same = list(verdicts(compare(a, b)).values())
        slower = list(verdicts(compare(a, slowed(b, 1.2))).values())
        wrong += not set(same) <= {"no slower", "too noisy"} or not set(slower) <= {"slower", "too noisy"}
        known += same.count("no slower") + slower.count("slower")
    assert wrong <= 2 and known > 0.4 * 20 * 2 * len(CASES)


def test_it_is_found_in_one_case_among_others() -> None:
    for i, case in enumerate(CASES):
        changes = compare(made_results(i), slowed(made_results(i + 1000), 1.3, "softxent", case))
        found = verdicts(changes)
        assert found.pop(case) == "slower" and "slower" not in found.values()
        assert regressed(changes)


def test_side_by_side_takes_the_differences_of_a_run() -> None:
    """Machines that drift from run to run, by far more than the change."""
    drift = [2.0**i for i in range(6)]
    noise = [1.001, 0.999, 1.002, 0.998, 1.0, 1.0]
    slower = [1.1 * t * e for t, e in zip(drift, noise, strict=True)]
    change = Change(CASE, "softxent", "too noisy")
    judge(change, drift, slower, 1, 0.05, paired=True)
    assert change.verdict == "slower" and change.ratio == pytest.approx(1.1, rel=1e-3)
    unpaired = Change(CASE, "softxent", "too noisy")
    judge(unpaired, drift, slower, 1, 0.05, paired=False)
    assert unpaired.verdict == "too noisy"


@pytest.mark.parametrize("pairs", [True, False])
def test_the_interval_holds_as_often_as_it_says(pairs: bool) -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(1000):
        a, b = np.exp(rng.normal(0, 0.02, (2, 6)))
        low, high = interval(a.tolist(), (1.1 * b).tolist(), 0.9, pairs)
        missed += not low < 1.1 < high
    assert 40 <= missed <= 130, "of 1000 intervals at 90 %; that of files is on the safe side"


def test_more_intervals_are_wider_ones() -> None:
    alone, among = (Change(CASE, "softxent", "") for _ in range(2))
    for change, n in ((alone, 1), (among, 50)):
        judge(change, [1.0, 1.01, 0.99], [1.0, 1.02, 1.01], n, 0.05, paired=False)
    assert among.high and alone.high and among.high > alone.high > 1


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (1.01, 1.04, "no slower"),
        (1.01, 1.06, "slower"),
        (0.99, 1.06, "too noisy"),
        (0.94, 1.04, "no slower"),
        (0.94, 0.99, "faster"),
        (0.96, 0.99, "no slower"),
        (0.8, 1.2, "too noisy"),
    ],
)
def test_verdicts_say_what_the_interval_says(
    low: float, high: float, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["bench.compare"], "interval", lambda *_: (low, high))
    change = Change(CASE, "softxent", "too noisy")
    judge(change, [1, 1], [1, 1], 1, 0.05, paired=True)
    assert change.verdict == word == verdict([change])


def test_one_run_has_no_verdict() -> None:
    a, b = made_results(0, "cuda"), slowed(made_results(1, "cuda"), 1.5)
    changes = compare(a, b)
    assert set(verdicts(changes, figure="graph").values()) == {"too noisy"} and not regressed(changes)
    assert "what differs between runs is not known" in report(changes, a, b)
    assert report(changes, a, b).endswith("too noisy to tell; more --runs, or a quieter machine\n")


def test_what_slows_the_whole_turn_is_no_regression() -> None:
    b = made_results(1)
    for name in ("softxent", "softxent-inplace", "eager", "quack", "copy"):
        slowed(b, 3.0, name)
    assert "slower" not in {change.verdict for change in compare(made_results(0), b)}


def test_an_improvement_is_no_regression() -> None:
    changes = compare(made_results(0), slowed(made_results(1), 0.7))
    assert set(verdicts(changes).values()) == {"faster"} and not regressed(changes)


def test_the_tolerance_is_the_callers_to_choose() -> None:
    a, b = made_results(0), slowed(made_results(1), 1.3)
    changes = compare(a, b, 1.0)
    assert not regressed(changes) and "100 %" in report(changes, a, b, 1.0)


def test_errors_are_changes_of_their_own() -> None:
    a, b = made_results(0), made_results(1)
    broken = measurement(b, "softxent")
    broken.error, broken.seconds = "the loss is 3 where 2 | 1 is right", {}
    changes = compare(a, b)
    assert verdicts(changes)[CASE] == "broken" and regressed(changes)
    assert line("broken", "softxent", CASE, "", "", "the loss is 3 where 2 / 1 is right") in told(changes, a, b)
    mended = compare(b, a)
    assert verdicts(mended)[CASE] == "mended" and not regressed(mended)
    in_both = {c for c in changes if c.contender == "softxent-inplace" and c.case.mode == "forward"}
    assert not in_both


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (10**9, 1.02 * 10**9, "more memory"),
        (10**9, 1.009 * 10**9, "no more memory"),
        (10**5, 10**5 + 4096, "no more memory"),
        (10**5, 10**5 + 4097, "more memory"),
        (0, 8192, "more memory"),
        (0, 4, "no more memory"),
        (1.02 * 10**9, 10**9, "less memory"),
    ],
)
def test_memory_that_grew_is_a_regression(before: float, after: float, found: str) -> None:
    a, b = made_results(0), made_results(1)
    measurement(a, "softxent", CASES[1]).peak_bytes = int(before)
    measurement(b, "softxent", CASES[1]).peak_bytes = int(after)
    measurement(b, "quack").peak_bytes = 10**9  # a peer's decides nothing
    measurement(b, "softxent").peak_bytes = None  # not measured, not compared
    changes = compare(a, b)
    in_memory = verdicts(changes, figure="memory")
    assert in_memory.pop(CASES[1]) == found and set(in_memory.values()) == {"no more memory"}
    assert regressed(changes) == (found == "more memory")
    start = line(found, "softxent", CASES[1], "memory")
    assert (start in told(changes, a, b)) == (found != "no more memory")
    assert start in told(changes, a, b, full=True)


def test_a_graph_that_is_none_any_more_is_a_regression() -> None:
    a, b = made_results(0, "cuda"), made_results(1, "cuda")
    lost = measurement(b, "softxent")
    lost.not_captured = "RuntimeError: it waits for the device"
    del lost.seconds["graph"]
    changes = compare(a, b)
    assert verdicts(changes, figure="graph")[CASE] == "broken" and "it waits for the device" in report(changes, a, b)


def test_a_missing_case_is_a_regression() -> None:
    a, b = made_results(0), made_results(1)
    b.measurements = [one for one in b.measurements if one.case != CASE]
    changes = compare(a, b)
    assert verdicts(changes)[CASE] == "missing"
    assert regressed(changes)
    assert "1 cases of B are not in A" in report(compare(b, a), b, a)


def test_a_peer_that_is_gone_is_counted_and_decides_nothing() -> None:
    a, b = made_results(0), made_results(1)
    b.measurements = [one for one in b.measurements if one.contender != "quack"]
    b.contenders["quack"] = {"unavailable": "not installed"}
    changes = compare(a, b)
    assert not regressed(changes)
    assert "missing|" not in told(changes, a, b) and f"* quack: {len(CASES)} missing\n" in report(changes, a, b)


def test_a_peer_decides_nothing() -> None:
    changes = compare(made_results(0), slowed(made_results(1), 1.5, "quack"))
    assert "slower" in verdicts(changes, "quack").values()
    assert not regressed(changes)


def test_without_the_reference_nothing_is_claimed() -> None:
    b = made_results(1)
    gone = measurement(b, "eager")
    gone.error, gone.seconds = "out of memory", {}
    changes = compare(made_results(0), b)
    assert verdicts(changes)[CASE] == "too noisy"
    assert "no time of the reference in B" in report(changes, made_results(0), b)


@pytest.mark.parametrize("key", ["cpu", "instructions", "threads", "torch", "triton"])
def test_other_machines_and_versions_are_refused_unless_told(key: str, tmp_path: Path) -> None:
    a, b = made_results(0), made_results(1)
    (b.environment if key in ("torch", "triton") else b.environment["before"])[key] = "another"
    with pytest.raises(BadInput, match=r"not the same .*another\): .*--anyway") as caught:
        check_comparable(a, b)
    assert "\n" not in str(caught.value)
    for name, found in (("a.json", a), ("b.json", b)):
        results.save(found, tmp_path / name)
    files = [str(tmp_path / "a.json"), str(tmp_path / "b.json")]
    assert (main(["compare", *files]), main(["compare", "--anyway", *files])) == (2, 0)


def test_other_devices_are_refused() -> None:
    for other in (made_results(1, "cuda"), dataclasses.replace(made_results(1), rehearsed=True)):
        with pytest.raises(BadInput, match="not the same device"):
            check_comparable(made_results(0), other)


# A package in softxent's place, for the processes of a real comparison: eager PyTorch, and some work more.
PACKAGE = """
import torch
import torch.nn.functional as F
__version__ = "1"

def fused_softmax_xent(logits, target):
    for _ in range({count}):
        pass
    kept = [logits.detach().clone() for _ in range({keeps})]
    return F.cross_entropy(logits, target) * {factor} + 0 * sum(one.sum() for one in kept)
"""


def side_by_side(tmp_path: Path, *versions: str, runs: int) -> tuple[Results, Results]:
    for i, text in enumerate(versions):
        folder = tmp_path / str(i) / "kernels/softxent"
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text(text)
    cases = [Case("cross_entropy", 64, 100, "float32", "step")]
    return paired.side_by_side(tmp_path / "0", tmp_path / "1", cases, ["softxent"], runs, 1)


def package(count: int = 0, keeps: int = 0, factor: float = 1.0) -> str:
    return PACKAGE.format(count=count, keeps=keeps, factor=factor)


def test_real_processes_side_by_side(tmp_path: Path) -> None:
    """Of twice the work each run is seen as slower, whatever the neighbours do; and memory is."""
    a, b = side_by_side(tmp_path, package(30_000), package(60_000, keeps=2), runs=2)
    (change,) = (c for c in compare(a, b, paired=True) if c.figure == "calls")
    assert change.ratio is not None and change.low is not None and 1.3 < change.ratio < 2.5
    assert change.verdict == "slower" or (change.high is not None and math.log(change.high / change.low) > 0.5)
    assert verdicts(compare(a, b, paired=True), figure="memory") != {CASE: "no more memory"}
    one = a.measurements[0]
    assert [len(turns) for turns in one.seconds["calls"]] == [paired.TURNS] * 2
    assert a.environment["before"]["threads"] == 1 and a.environment["before"]["clock"] == "CPU time"


def test_who_is_wrong_is_not_timed_beside_the_other(tmp_path: Path) -> None:
    a, b = side_by_side(tmp_path, package(), package(factor=1.1), runs=1)
    changes = compare(a, b, paired=True)
    assert [change.verdict for change in changes] == ["broken"] and "the loss is" in changes[0].note
    assert a.measurements[0].seconds == b.measurements[0].seconds == {}


def test_a_process_that_ends_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="a process ended with"):
        side_by_side(tmp_path, package(), "raise SystemExit(3)", runs=1)


def test_what_is_no_checkout_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "--run", str(tmp_path), str(tmp_path)]) == 2
    assert "is no checkout: it has no kernels/softxent" in capsys.readouterr().err
    assert main(["compare", "--run", "no-such-commit", "."]) == 2
    assert "neither a folder nor a commit" in capsys.readouterr().err
