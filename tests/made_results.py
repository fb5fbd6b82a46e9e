"""Results as a run would leave them, without one: times with the noise of a shared machine."""

import numpy as np

from bench.cases import Case
from bench.results import Measurement, Results, merged

CASES = tuple(
    Case("cross_entropy", n_rows, n_cols, dtype, mode)
    for mode in ("step", "forward")
    for dtype in ("bfloat16", "float32")
    for n_rows, n_cols in ((52429, 10), (5, 128256))
)
SPEED = {"softxent": 1.0, "softxent-inplace": 0.9, "eager": 2.1, "quack": 1.3, "copy": 0.8}
NOISE = {"cuda": 0.004, "cpu": 0.015}  # of each contender for itself
COMMON = {"cuda": 0.1, "cpu": 0.3}  # of the machine
BETWEEN = {"cuda": 0.002, "cpu": 0.01}  # runs
HOST = 2e-5  # seconds of a call's launches on a GPU


def bursts(rng: np.random.Generator, n: int, size: float) -> np.ndarray:
    """[n] autocorrelated noise: x_i = x_(i-1) / 2 + e_i."""
    noise = rng.normal(0, size, n)
    for i in range(1, n):
        noise[i] += noise[i - 1] / 2
    return noise


def made_results(
    seed: int, device: str = "cpu", n_turns: int = 50, cases: tuple[Case, ...] = CASES, n_runs: int | None = None
) -> Results:
    """In each turn, all contenders share the machine's noise; one in twenty is late by itself. A GPU's is one run."""
    n_runs = n_runs or (5 if device == "cpu" else 1)
    return merged([one_run(np.random.default_rng((seed, i)), device, n_turns, cases) for i in range(n_runs)])


def one_run(rng: np.random.Generator, device: str, n_turns: int, cases: tuple[Case, ...]) -> Results:
    before = {"cpu": "a CPU", "threads": 1} if device == "cpu" else {"gpu": "a GPU", "clock_mhz": "1980"}
    results = Results("CPU a" if device == "cpu" else "A GPU", {"commit": "abc", "torch": "2.13.0", "before": before})
    results.contenders = {name: {"version": "1.0"} for name in SPEED if name != "copy"}
    results.contenders["liger"] = {"unavailable": "not installed"}
    results.ceilings = {"copy": 3e12}
    for case in cases:
        least = case.least_bytes / 2.5e12
        times: dict[str, list[float]] = {}
        common = np.exp(bursts(rng, n_turns, COMMON[device]))
        for name, speed in SPEED.items():
            late = np.where(rng.random(n_turns) < 0.05, 1 + rng.exponential(1, n_turns), 1)
            own = np.exp(bursts(rng, n_turns, NOISE[device]) + rng.normal(0, BETWEEN[device]))
            times[name] = (least * speed * common * own * late).tolist()
        for name, turns in times.items():
            host = HOST * np.exp(bursts(rng, n_turns, NOISE["cpu"]))
            seconds = {"calls": [turns]} if device == "cpu" else {"graph": [turns], "calls": [(turns + host).tolist()]}
            if name == "softxent-inplace" and case.mode == "forward":
                results.measurements.append(Measurement(case, name, error="does not do it: there is no gradient"))
                continue
            one = Measurement(case, name, seconds=seconds)
            if name != "copy":
                one.peak_bytes, one.first_seconds = round(case.matrix_bytes * SPEED[name]), SPEED[name] / 10
            results.measurements.append(one)
    return results
