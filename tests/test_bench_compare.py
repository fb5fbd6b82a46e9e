"""Two runs side by side: what is slower is found, and noise is not."""

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench import contenders, machine, results, suite
from bench.cases import Case
from bench.compare import Change, compare, regressed, report, student
from bench.contenders import Contender
from bench.results import BadInput, Measurement, Results
from made_results import CASES, made_results


def slowed(found: Results, factor: float, contender: str = "softxent", *cases: Case) -> Results:
    for one in found.measurements:
        if one.contender == contender and one.case in (cases or CASES):
            one.seconds = {method: [factor * t for t in turns] for method, turns in one.seconds.items()}
    return found


def verdicts(changes: list[Change], contender: str = "softxent") -> dict[Case, str]:
    return {change.case: change.verdict for change in changes if change.contender == contender}


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
    for seed in range(50):
        changes = compare(made_results(seed, device), made_results(seed + 1000, device))
        assert not regressed(changes, everyone=True), report(changes, made_results(seed), made_results(seed))


def test_two_runs_of_the_same_code_pass_without_a_tolerance_too() -> None:
    """The level alone: at 99 % for all together, of 50 comparisons hardly one may fail."""
    failed = sum(regressed(compare(made_results(seed), made_results(seed + 1000), 0.0)) for seed in range(50))
    assert failed <= 2


def test_the_interval_covers_the_change_and_its_estimate() -> None:
    for change in compare(made_results(0), slowed(made_results(1), 1.2)):
        if change.contender == "softxent":
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
    forward = {change for change in verdicts(changes, "softxent-inplace") if change.mode == "forward"}
    assert not forward


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
    assert f"| missing | softxent | {CASES[0]} |" in report(changes, a, b)
    assert "1 cases of B are not in A" in report(compare(b, a), b, a)


def test_a_peer_that_is_gone_is_said_once_and_decides_nothing() -> None:
    a, b = made_results(0), made_results(1)
    b.measurements = [one for one in b.measurements if one.contender != "quack"]
    b.contenders["quack"] = {"unavailable": "not installed"}
    changes = compare(a, b)
    assert not regressed(changes)
    assert report(changes, a, b).count("| missing | quack |") == 1
    assert "| missing | quack | every case |  | not installed |" in report(changes, a, b)


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


CASE = Case("cross_entropy", 64, 10, "float32", "step")


def asleep(seconds: float) -> Contender:
    """Eager PyTorch's results, after a sleep: a busy machine is not in its way."""

    def loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        time.sleep(seconds)
        return F.cross_entropy(logits, target)

    return Contender("", "cross_entropy", "1.0", lambda case: loss)


@pytest.mark.parametrize("planted", [0.0, 0.5])
def test_two_real_runs(planted: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def one_run(slower: float) -> Results:
        made = {"softxent": asleep(0.01 * (1 + slower)), "eager": asleep(0.01)}
        monkeypatch.setattr(contenders, "load", lambda name, device_type: made[name])
        path = tmp_path / f"{slower}-{time.perf_counter_ns()}.json"
        found = suite.begin(machine.Cpu(), path, made, lambda line: None)
        suite.run([CASE], machine.Cpu(), found, path, 0.7, lambda line: None)
        return results.load(path)

    a, b = one_run(0.0), one_run(planted)
    changes = compare(a, b)
    assert [(change.case, change.contender) for change in changes] == [(CASE, "softxent")]
    assert regressed(changes) == (planted > 0), report(changes, a, b, full=True)


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
