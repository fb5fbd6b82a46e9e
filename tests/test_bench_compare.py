"""Two runs side by side: what is slower is found, and noise is not."""

import dataclasses
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import contenders, machine, results, suite
from bench.cases import Case
from bench.command import main
from bench.compare import TOLERANCE, Change, compare, regressed, report, student, verdict
from bench.contenders import Contender
from bench.results import BadInput, Measurement, Results
from bench.work import Run
from made_results import CASES, made_results


def slowed(found: Results, factor: float, contender: str = "softxent", *cases: Case) -> Results:
    for one in found.measurements:
        if one.contender == contender and one.case in (cases or CASES):
            one.seconds = {method: [factor * t for t in turns] for method, turns in one.seconds.items()}
    return found


def verdicts(changes: list[Change], contender: str = "softxent", figure: str = "") -> dict[Case, str]:
    """Of the kernels' time, unless told: a GPU's graph, or else calls."""
    figure = figure or ("graph" if any(change.figure == "graph" for change in changes) else "calls")
    of_contender = [change for change in changes if change.contender == contender]
    return {change.case: change.verdict for change in of_contender if change.figure in (figure, "")}


def measurement(found: Results, contender: str, case: Case = CASES[0]) -> Measurement:
    return found.of(case)[contender]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_planted_slowdown_is_found_wherever_it_is_planted(device: str) -> None:
    for seed in range(5):
        a, b = made_results(seed, device), slowed(made_results(seed + 1000, device), 1.2)
        changes = compare(a, b)
        assert set(verdicts(changes).values()) == {"slower"}
        assert len(verdicts(changes)) == len(CASES)
        assert regressed(changes)


def test_it_is_found_in_one_case_among_others() -> None:
    for i, case in enumerate(CASES):
        changes = compare(made_results(i, "cuda"), slowed(made_results(i + 1000, "cuda"), 1.2, "softxent", case))
        found = verdicts(changes)
        assert found.pop(case) == "slower"
        assert "slower" not in found.values()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_two_runs_of_the_same_code_pass(device: str) -> None:
    """With the tolerance all; without, at 99 % for all intervals together, of 50 comparisons hardly one may fail."""
    failed = 0
    for seed in range(50):
        changes = compare(made_results(seed, device), made_results(seed + 1000, device), 0.0)
        failed += regressed(changes)
        timed = [change for change in changes if change.low is not None]
        assert len(timed) >= 20 and "slower" not in {verdict(change, TOLERANCE[change.figure]) for change in timed}
    assert failed <= 2
    for seed in range(5):
        assert not regressed(compare(made_results(seed, device), made_results(seed + 1000, device)), everyone=True)


def test_the_interval_covers_the_change_and_its_estimate() -> None:
    for change in compare(made_results(0), slowed(made_results(1), 1.2)):
        if change.contender == "softxent" and change.figure != "memory":
            assert change.low is not None and change.ratio is not None and change.high is not None
            assert change.low < 1.2 < change.high
            assert change.low < change.ratio < change.high


def test_what_slows_the_whole_turn_is_no_regression() -> None:
    b = made_results(1)
    for name in ("softxent", "softxent-inplace", "eager", "quack", "copy"):
        slowed(b, 3.0, name)
    assert not regressed(compare(made_results(0), b), everyone=True)


def test_an_improvement_is_no_regression() -> None:
    changes = compare(made_results(0), slowed(made_results(1), 0.7))
    assert set(verdicts(changes).values()) == {"faster"}
    assert not regressed(changes)


def test_the_number_of_turns_may_differ() -> None:
    a, b = made_results(0, n_turns=50), made_results(1, n_turns=21)
    assert not regressed(compare(a, b))
    assert regressed(compare(a, slowed(b, 1.6)))


def test_too_much_noise_is_said_and_is_no_regression() -> None:
    a, b = made_results(0, n_turns=7), made_results(1, n_turns=7)
    for i, one in enumerate(b.measurements):
        one.seconds = {method: [t * (1 + (i + k) % 3) for k, t in enumerate(ts)] for method, ts in one.seconds.items()}
    changes = compare(a, b)
    assert "unclear" in verdicts(changes).values()
    assert not regressed(changes)


def test_the_tolerance_is_the_callers_to_choose() -> None:
    a, b = made_results(0), slowed(made_results(1), 1.2)
    assert not regressed(compare(a, b, tolerance=0.5))
    assert "50 %" in report(compare(a, b, tolerance=0.5), a, b, tolerance=0.5)


def test_a_new_error_is_a_regression() -> None:
    b = made_results(1)
    broken = measurement(b, "softxent")
    broken.error, broken.seconds = "the loss is 3 where 2 is right", {}
    changes = compare(made_results(0), b)
    assert verdicts(changes)[CASES[0]] == "broken"
    assert regressed(changes)
    assert "the loss is 3 where 2 is right" in report(changes, made_results(0), b)
    assert not regressed(compare(b, made_results(0)))
    assert verdicts(compare(b, made_results(0)))[CASES[0]] == "mended"


def test_an_error_in_both_is_no_change() -> None:
    changes = compare(made_results(0), made_results(1))
    forward = {change for change in changes if change.contender == "softxent-inplace" and change.case.mode == "forward"}
    assert not forward


def test_what_the_host_became_slower_by_is_found_where_the_kernels_did_not() -> None:
    for seed in range(5):
        b = made_results(seed + 1000, "cuda")
        for one in b.measurements:
            if one.contender == "softxent":
                one.seconds["calls"] = [1.2 * t for t in one.seconds["calls"]]
        changes = compare(made_results(seed, "cuda"), b)
        assert set(verdicts(changes, figure="calls").values()) == {"slower"}
        assert set(verdicts(changes, figure="graph").values()) == {"no slower"}
        assert regressed(changes)
        assert f"| slower | softxent | {CASES[0]} | calls | 1." in report(changes, b, b)


def test_calls_beside_other_processors_are_left_out() -> None:
    a, b = made_results(0, "cuda"), other_cpu(slowed(made_results(1, "cuda"), 1.2))
    changes = compare(a, b)
    assert verdicts(changes, figure="calls") == {}
    assert set(verdicts(changes).values()) == {"slower"}
    assert "processor beside the GPU" in report(changes, a, b)


def test_the_intervals_of_both_methods_hold_together() -> None:
    """As many as are told, and each is as wide as that asks."""
    a, b = made_results(0, "cuda"), made_results(1, "cuda")
    changes = compare(a, b)
    n = sum(change.figure in ("graph", "calls") for change in changes)
    assert n == 2 * sum(change.figure == "graph" for change in changes) > 50
    assert f"the {n} intervals" in report(changes, a, b)
    alone = made_results(0, "cuda", cases=CASES[:1]), made_results(1, "cuda", cases=CASES[:1])
    for results_of in alone:
        results_of.measurements = [one for one in results_of.measurements if one.contender in ("softxent", "copy")]
        for one in results_of.measurements:
            del one.seconds["calls"]
    (single,) = (change for change in compare(*alone) if change.figure == "graph")
    among = next(change for change in changes if change.case == CASES[0] and change.figure == "graph" and change.own)
    assert single.ratio == among.ratio
    # Student's t with 24 degrees of freedom: 2.80 for one interval, 4.4 for a hundred.
    assert 1.3 < width(among) / width(single) < 2


def width(change: Change) -> float:
    assert change.low is not None and change.high is not None
    return math.log(change.high / change.low)


@pytest.mark.parametrize(
    ("before", "after", "found"),
    [
        (10**9, 1.02 * 10**9, "more memory"),
        (10**9, 1.009 * 10**9, "no more memory"),
        (10**5, 10**5 + 4096, "no more memory"),
        (10**5, 10**5 + 4097, "more memory"),
        (0, 8192, "more memory"),
        (0, 4, "no more memory"),
        (10**9, 10**9, "no more memory"),
        (1.02 * 10**9, 10**9, "less memory"),
    ],
)
def test_memory_that_grew_is_a_regression(before: float, after: float, found: str) -> None:
    for device in ("cpu", "cuda"):
        a, b = made_results(0, device), made_results(1, device)
        measurement(a, "softxent", CASES[1]).peak_bytes = int(before)
        measurement(b, "softxent", CASES[1]).peak_bytes = int(after)
        changes = compare(a, b)
        in_memory = verdicts(changes, figure="memory")
        assert in_memory.pop(CASES[1]) == found and set(in_memory.values()) == {"no more memory"}
        assert regressed(changes) == (found == "more memory")
        line = f"| {found} | softxent | {CASES[1]} | memory |"
        assert (line in report(changes, a, b)) == (found != "no more memory")
        assert line in report(changes, a, b, full=True)


def test_a_peers_memory_decides_only_when_asked() -> None:
    b = made_results(1)
    more = measurement(b, "quack")
    assert more.peak_bytes is not None
    more.peak_bytes *= 2
    changes = compare(made_results(0), b)
    assert not regressed(changes) and regressed(changes, everyone=True)


def test_memory_that_was_not_measured_is_not_compared() -> None:
    b = made_results(1)
    measurement(b, "softxent").peak_bytes = None
    changes = compare(made_results(0), b)
    assert CASES[0] not in verdicts(changes, figure="memory") and not regressed(changes)


def test_a_graph_that_is_none_any_more_is_a_regression() -> None:
    b = made_results(1, "cuda")
    lost = measurement(b, "softxent")
    lost.not_captured = "RuntimeError: it waits for the device"
    del lost.seconds["graph"]
    changes = compare(made_results(0, "cuda"), b)
    assert verdicts(changes)[CASES[0]] == "broken"
    assert "it waits for the device" in report(changes, made_results(0, "cuda"), b)


def test_a_missing_case_is_a_regression_unless_told_otherwise() -> None:
    a, b = made_results(0), made_results(1)
    b.measurements = [one for one in b.measurements if one.case != CASES[0]]
    changes = compare(a, b)
    assert verdicts(changes)[CASES[0]] == "missing"
    assert regressed(changes)
    assert not regressed(changes, missing_ok=True)
    assert f"| missing | softxent | {CASES[0]} |  |" in report(changes, a, b)
    assert "1 cases of B are not in A" in report(compare(b, a), b, a)


def test_a_peer_that_is_gone_is_said_once_and_decides_nothing() -> None:
    a, b = made_results(0), made_results(1)
    b.measurements = [one for one in b.measurements if one.contender != "quack"]
    b.contenders["quack"] = {"unavailable": "not installed"}
    changes = compare(a, b)
    assert not regressed(changes)
    assert report(changes, a, b).count("| missing | quack |") == 1
    assert "| missing | quack | every case |  |  | not installed |" in report(changes, a, b)


def test_a_peer_decides_only_when_asked() -> None:
    changes = compare(made_results(0), slowed(made_results(1), 1.5, "quack"))
    assert "slower" in verdicts(changes, "quack").values()
    assert not regressed(changes)
    assert regressed(changes, everyone=True)


def test_without_the_reference_nothing_is_claimed() -> None:
    b = made_results(1)
    gone = measurement(b, "eager")
    gone.error, gone.seconds = "out of memory", {}
    changes = compare(made_results(0), b)
    assert verdicts(changes)[CASES[0]] == "unclear"
    assert "no times of eager in B" in report(changes, made_results(0), b, full=True)


def test_another_torch_is_said() -> None:
    b = made_results(1)
    b.environment["torch"] = "2.14.0"
    assert "2.13.0 and 2.14.0" in report(compare(made_results(0), b), made_results(0), b)


def other_cpu(found: Results) -> Results:
    found.environment["before"]["cpu"] = "another CPU"
    return found


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (made_results(0), made_results(1, "cuda"), "different devices.*CPU and A GPU"),
        (made_results(0), dataclasses.replace(made_results(1), rehearsed=True), "different devices.*CPU and a rehears"),
        (made_results(0), other_cpu(made_results(1)), "different processors.*a CPU and another CPU"),
        (made_results(0, cases=CASES[:1]), made_results(1, cases=CASES[1:]), "no case in common"),
    ],
)
def test_what_cannot_be_compared_is_refused(a: Results, b: Results, words: str) -> None:
    with pytest.raises(BadInput, match=words) as caught:
        compare(a, b)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("probability", "degrees", "right"),
    [(0.995, 12, 3.0545), (0.9995, 10, 4.5869), (0.9995, 24, 3.7454), (0.975, 120, 1.9799)],
)
def test_the_quantile_is_that_of_the_tables(probability: float, degrees: int, right: float) -> None:
    assert student(probability, degrees) == pytest.approx(right, rel=0.005)


CASE = Case("cross_entropy", 256, 100, "float32", "step")
WORK = 0.005  # seconds of the processor's time


def working(seconds: float, keeps: int = 0) -> Contender:
    """Eager PyTorch's results, after so many seconds of work, and with so many matrices beside them."""

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        end = time.thread_time() + seconds
        while time.thread_time() < end:
            pass
        kept = [logits.detach().clone() for _ in range(keeps)]
        return F.cross_entropy(logits, target) + 0 * sum(one.sum() for one in kept)

    return Contender("", "cross_entropy", "1.0", lambda case: loss)


class Undisturbed(machine.Cpu):
    """Its clock stands still while another process has the processor: beside two of them, sleeps differ by a fifth."""

    def seconds(self, run: Run) -> float:
        start = time.thread_time()
        run()
        return time.thread_time() - start


RealRun = Callable[[Contender, Contender, float], Path]


@pytest.fixture
def real_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> RealRun:
    """The whole suite, on the CPU, with a contender in softxent's place, and one in eager PyTorch's: a results file."""
    monkeypatch.setattr(suite, "CEILING_BYTES", {"cpu": 1 << 16})

    def run(ours: Contender, eager: Contender, seconds: float) -> Path:
        made = {"softxent": ours, "eager": eager}
        monkeypatch.setattr(contenders, "load", lambda name, device_type: made[name])
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        found = suite.begin(Undisturbed(), path, made, lambda line: None)
        suite.run([CASE], Undisturbed(), found, path, seconds, lambda line: None)
        return path

    return run


def test_real_runs_of_the_same_code_pass_and_twenty_per_cent_are_found(
    real_run: RealRun, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after, slower = (real_run(working(WORK * factor), working(WORK), 1.0) for factor in (1.0, 1.0, 1.2))
    status = main(["compare", "--full", str(before), str(after)])
    assert status == 0, capsys.readouterr().out
    status = main(["compare", str(before), str(slower)])
    said = capsys.readouterr().out
    assert status == 1 and f"| slower | softxent | {CASE} | calls | 1." in said, said


def test_memory_that_a_real_run_takes_is_found(real_run: RealRun) -> None:
    before, after, greedy = (results.load(real_run(working(0, keeps), working(0), 0.01)) for keeps in (3, 3, 5))
    assert verdicts(compare(before, after), figure="memory") == {CASE: "no more memory"}
    changes = [change for change in compare(before, greedy) if change.figure == "memory"]
    assert [change.verdict for change in changes] == ["more memory"] and regressed(changes)


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    results.save(made_results(0), tmp_path / "good.json")
    good: dict[str, Any] = json.loads((tmp_path / "good.json").read_text())

    def file(content: Any) -> Path:
        path = tmp_path / "bad.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return path

    def with_first(**changes: Any) -> dict[str, Any]:
        return good | {"measurements": [good["measurements"][0] | changes, *good["measurements"][1:]]}

    bad: list[tuple[Path | Any, str]] = [
        (tmp_path / "none.json", "No such file"),
        (tmp_path, "Is a directory"),
        ("{", "not JSON"),
        ([], "no results file of this suite"),
        (good | {"schema": 2}, "has schema 2; this suite reads schema 1"),
        ({"schema": 1}, "is damaged"),
        (good | {"measurements": 3}, "is damaged"),
        (good | {"measurements": [None]}, "is damaged"),
        (with_first(case={"op": "softmax"}), "is damaged"),
        (with_first(seconds=[1.0]), "is damaged"),
        (with_first(seconds={"calls": ["1"] * 50}), "not positive"),
        (with_first(seconds={"calls": [float("nan")] * 50}), "not positive"),
        (with_first(seconds={"calls": [0.0] * 50}), "not positive"),
        (with_first(seconds={"calls": [1.0] * 49}), "other turns"),
    ]
    for content, words in bad:
        path = content if isinstance(content, Path) else file(content)
        with pytest.raises(BadInput, match=words) as caught:
            results.load(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
