"""Turns: everyone in each, in changing order; inputs rotated; what is overwritten is restored outside the clock."""

from functools import partial

import torch

import planted
from bench import timing
from bench.cases import Case, inputs
from bench.machine import CannotCapture, Cpu, Rehearsal
from bench.timing import Contestant, contest, in_turns, sets_of
from bench.work import Run, Work

STEP = Case("cross_entropy", 37, 11, "float32", "step")
CPU = torch.device("cpu")


def test_everyone_is_in_each_turn() -> None:
    seen: list[str] = []
    ran = {name: Contestant(timing.nothing, partial(seen.append, name), 4) for name in "abc"}
    found = in_turns(ran, planted.Clock(lambda _: 8.0), seconds=1e-9)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abc", timing.FEWEST)
    assert {time for times in found.values() for time in times} == {2.0}, "a turn of four calls is divided by four"
    turns = ["".join(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 2, "always in the same order"
    assert len(turns) == timing.FEWEST + 1, "the first round is not counted"


def test_more_time_makes_more_turns_up_to_a_limit() -> None:
    ran = {"a": Contestant(timing.nothing, timing.nothing, 1)}
    assert len(in_turns(ran, Cpu(), seconds=100)["a"]) == timing.MOST


def test_a_set_of_inputs_is_long_out_of_the_cache() -> None:
    machine = Rehearsal()
    machine.l2_bytes = 1000
    assert sets_of(machine, 300) * 300 > 3 * machine.l2_bytes
    assert sets_of(machine, 10**9) == 2 and sets_of(machine, 1) == timing.MOST_SETS
    assert sets_of(Cpu(), 1 << 24) == 1 and sets_of(Cpu(), 10_240) == timing.MOST_SETS


def test_both_methods_on_a_gpu_and_one_on_a_cpu() -> None:
    works = planted.works(STEP, right=planted.right)
    sets = [inputs(STEP, CPU, i) for i in range(3)]
    other = torch.empty_like(sets[0].logits)
    copy = partial(other.copy_, sets[0].logits.detach())
    rehearsed = contest(works, sets, Rehearsal(), 0.01, copy)
    assert list(rehearsed) == ["right", "copy"]
    assert all(sorted(one.seconds) == ["calls", "graph"] for one in rehearsed.values())
    assert sorted(contest(works, sets[:1], Cpu(), 0.01, copy)["right"].seconds) == ["calls"]
    turns = {len(times) for one in rehearsed.values() for (times,) in one.seconds.values()}
    assert len(turns) <= 2, "contenders of a method have the same number of turns"


def test_what_cannot_be_captured_is_said_and_timed_by_calls() -> None:
    class Waiting(Rehearsal):
        def capture(self, run: Run) -> Run:
            raise CannotCapture("it waits for the device")

    works = planted.works(STEP, right=planted.right)
    found = contest(works, [inputs(STEP, CPU, 0)], Waiting(), 0.01, timing.nothing)
    assert found["right"].not_captured == "it waits for the device"
    assert list(found["right"].seconds) == ["calls"]


def test_nobody_is_timed_on_logits_that_another_overwrote() -> None:
    works = planted.works(STEP, right=planted.right)
    works["inplace"] = Work(planted.contender(planted.overwriting, overwrites=True), STEP)
    sets = [inputs(STEP, CPU, i) for i in range(2)]
    given = [one.logits.detach().clone() for one in sets]
    seen: list[bool] = []
    function = works["right"].function

    def watched(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(any(torch.equal(logits, one) for one in given))
        return function(logits, target)

    works["right"].function = watched
    contest(works, sets, Cpu(), 0.01, timing.nothing)
    assert len(seen) > 2 * timing.FEWEST and all(seen)


def test_overwritten_logits_are_restored_before_each_turn() -> None:
    work = Work(planted.contender(planted.overwriting, overwrites=True), STEP)
    sets = [inputs(STEP, CPU, i) for i in range(2)]
    given = [one.logits.detach().clone() for one in sets]
    seen: list[bool] = []
    function = work.function

    def watched(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append(any(torch.equal(logits, one) for one in given))
        return function(logits, target)

    work.function = watched
    for machine in (Cpu(), Rehearsal()):
        seen.clear()
        contest({"inplace": work}, sets, machine, 0.01, timing.nothing)
        # A rehearsal's first call and capture come before the turns and leave gradients behind.
        assert len(seen) >= 2 * timing.FEWEST and all(seen[-2 * timing.FEWEST :])
        for one, logits in zip(sets, given, strict=True):
            one.logits.data.copy_(logits)
