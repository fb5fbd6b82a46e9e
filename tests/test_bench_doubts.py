"""A device that was slowed down is said aloud, and so is a median of turns that differ too much."""

from typing import Any

import pytest
import torch
from matplotlib.figure import Figure

import planted
from bench import contenders, pretend, suite
from bench.cases import Case
from bench.compare import compare, report
from bench.doubts import doubts
from bench.machine import Cuda, Rehearsal
from bench.pictures import MEMORY, RATIO, SPEED, panel
from bench.results import Results
from bench.table import limit, table
from made_results import CASES, made_results

MADE = [made_results(0, device) for device in ("cpu", "cuda")]


def said(**environment: dict[str, str]) -> list[str]:
    found = made_results(0, "cuda")
    found.environment |= environment
    sentences = list(doubts(found))
    for text in sentences:
        assert f"* **doubtful**: {text}\n" in table(found)
        for a, b, which in ((MADE[1], found, "B"), (found, MADE[1], "A")):
            assert f"Doubtful in {which}: {text}.\n" in report(compare(a, b), a, b)
    return sentences


@pytest.mark.parametrize("made", MADE, ids=["cpu", "cuda"])
def test_nothing_is_said_of_a_run_that_was_not_disturbed(made: Results) -> None:
    assert list(doubts(made)) == []
    assert "oubtful" not in table(made) + report(compare(made, made), made, made)


def test_what_throttled_a_gpu_is_said() -> None:
    assert said(under_load={"throttled": "0x0000000000000044"}, after={"throttled": "0x0000000000000041"}) == [
        "the device was throttled (under_load): software power cap",
        "the device was throttled (under_load, after): hardware thermal slowdown",
    ]
    assert said(before={"throttled": "0x0000000000000001"}, after={"throttled": "not known"}) == []  # idle


@pytest.mark.parametrize("name", ["clock_mhz", "memory_clock_mhz"])
def test_a_clock_that_fell_under_load_is_said(name: str) -> None:
    def between(first: str, last: str) -> list[str]:
        return said(under_load={name: first}, under_load_after={name: last})

    assert between("2000", "1780") == [f"{name} under load fell from 2000 to 1780, by 11 %"]
    assert between("2000", "1910") == between("1780", "2000") == between("2000", "[N/A]") == []
    assert said(before={name: "2000"}, after={name: "345"}) == []  # idle


def test_the_suite_records_the_clocks_under_load(monkeypatch: pytest.MonkeyPatch) -> None:
    class Warming(Rehearsal):
        clock = 2000

        def describe(self) -> dict[str, Any]:
            self.clock -= 50
            return {"clock_mhz": str(self.clock)}

    monkeypatch.setattr(suite, "CEILING_BYTES", {"cpu": 1 << 16})
    monkeypatch.setattr(contenders, "load", lambda name, device_type: planted.contender(planted.right))
    machine = Warming()
    found = suite.begin(machine, None, ["softxent"])
    suite.run([Case("cross_entropy", 37, 11, "float32", "step")], machine, found, None, 0.01)
    states = [found.environment[when]["clock_mhz"] for when in ("before", "under_load", "under_load_after", "after")]
    assert states == ["1950", "1900", "1850", "1800"]
    machine.clock = 1000
    suite.run([], machine, found, None, 0.01)  # gone on with
    assert "clock_mhz under load fell from 1900 to 950, by 50 %" in list(doubts(found))


def drawn_at(found: Results, name: str) -> set[str]:
    """Who has a point at the first case of the picture's first panel."""
    axes = Figure().subplots()
    picture = next(one for one in (SPEED, RATIO, MEMORY) if one.name == name)
    return set(panel(axes, found, [CASES[0]], list(found.contenders), picture))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_figure_that_is_noisy_is_neither_printed_nor_drawn(device: str) -> None:
    found = made_results(0, device, n_turns=12, cases=CASES[:2], n_runs=1)
    for case in CASES[:2]:
        for one in found.of(case).values():  # as fast as the reference, for the ratios' sake
            t = one.least_bytes / found.ceilings["copy"]
            one.seconds = {method: [[t] * 12] for method in one.seconds}
    one = found.of(CASES[0])["softxent"]
    t = one.runs()[0]
    one.seconds = {method: [[t * (0.87, 1, 1.13)[i % 3] for i in range(12)]] for method in one.seconds}
    (doubt,) = doubts(found)
    assert doubt.startswith(f"1 of {8 if device == 'cpu' else 10} figures are noisy, by more than 25 %")
    line = next(line for line in table(found).splitlines() if line.startswith("| 52429 x 10 |"))
    cells = line.split("|")
    assert cells[2].startswith(" noisy (") and "**" not in cells[2] and "GB/s" not in cells[2]
    assert line.count("noisy") == 1
    for name in ("ratio", "memory") if device == "cpu" else ("speed", "memory"):
        drawn = "softxent" in drawn_at(found, name)
        assert drawn == (name == "memory"), "a picture shows what the table withholds"
    one.seconds = {method: [[t * (0.88, 1, 1.12)[i % 3] for i in range(12)]] for method in one.seconds}
    assert list(doubts(found)) == [] and "| noisy" not in table(found)


def test_the_limit_in_theory_is_beside_the_copys_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An H100's memory: 2619 MHz x 5120 bits x 2."""
    with pretend.gpu():
        described = Cuda().describe()
        assert described["memory_gb_per_s"] == 3352
        monkeypatch.delattr(pretend.ANSWERS["get_device_properties"], "memory_bus_width")
        assert Cuda().describe()["memory_gb_per_s"] == "unknown"
    found = made_results(0, "cuda")
    assert "reads and writes 3000 GB/s, in this run; " in limit(found) and "unknown in theory" in limit(found)
    found.environment["before"]["memory_gb_per_s"] = described["memory_gb_per_s"]
    assert f"* the limit: {limit(found)}\n" in table(found)
    assert "allow 3352 GB/s in theory" in limit(found)


def test_peak_memory_of_a_gpu_is_what_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was there before, and whatever the allocator makes of it."""
    now = {"requested_bytes.all.current": 1000, "requested_bytes.all.peak": 9999, "allocated_bytes.all.peak": 2 << 20}

    def reset(device: torch.device) -> None:
        now["requested_bytes.all.peak"] = now["requested_bytes.all.current"]

    def run() -> None:
        now["requested_bytes.all.peak"] += 300

    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(now))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    with pretend.gpu():
        assert Cuda().peak_bytes(run) == 300
