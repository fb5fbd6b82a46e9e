"""Results on disk: one JSON file, with the version of its schema, that is read back or refused with one clear line.

schema         SCHEMA
device         the name of what was measured; `rehearsed` where a CPU stood in for a GPU
environment    hardware, driver, clocks before and after, and under load, versions, seed, command line, git commit
contenders     name -> {"version", "overwrites": what it writes its result over, if it does} or {"unavailable": why}
ceilings       name -> bytes a second, measured in the same run: "copy" reads and writes
measurements   one for each case and contender:
    case           [op, n_rows, n_cols, dtype, mode, kind] (bench/cases.py)
    contender
    error          what is wrong with its results, or what it does not do; then there is no time
    errors         largest errors against float64: loss (relative), gradient (over its largest value)
    seconds        method -> run -> seconds of one call, turn by turn. A run is a process of its own
    not_captured   why there is no CUDA graph
    peak_bytes     the most that a call had asked for at once, beyond its inputs
    first_seconds  the first call in the process: compiling, or reading what was compiled before
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from bench.cases import Case

SCHEMA = 3
NOISY = 0.25  # a spread of more than this share of the figure: the figure is not shown


class BadInput(Exception):
    """What the user gave cannot be used; the message is one clear line. The command ends with 2."""


class Spread(NamedTuple):
    """A figure and its noise: the median of the runs, the lowest and the highest; of one run, the turns' quartiles."""

    low: float
    middle: float
    high: float

    @property
    def noisy(self) -> bool:
        return self.high - self.low > NOISY * self.middle


@dataclass
class Measurement:
    case: Case
    contender: str
    error: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, list[list[float]]] = field(default_factory=dict)
    not_captured: str | None = None
    peak_bytes: int | None = None
    first_seconds: float | None = None

    @property
    def method(self) -> str | None:
        """The figure that is shown: the kernels' where there is one."""
        return next((name for name in ("graph", "calls") if self.seconds.get(name)), None)

    @property
    def least_bytes(self) -> int:
        """What has to be moved; of the copy, which is no contender: what it reads and writes."""
        return 2 * self.case.matrix_bytes if self.contender == "copy" else self.case.least_bytes

    def runs(self, method: str | None = None) -> list[float]:
        """Seconds of a call in each run: the median of its turns."""
        return [median(turns) for turns in self.seconds.get(method or self.method or "", [])]


@dataclass
class Results:
    device: str
    environment: dict[str, Any] = field(default_factory=dict)
    contenders: dict[str, dict[str, str]] = field(default_factory=dict)
    ceilings: dict[str, float] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    rehearsed: bool = False
    schema: int = SCHEMA

    def cases(self) -> list[Case]:
        return list(dict.fromkeys(one.case for one in self.measurements))

    def of(self, case: Case) -> dict[str, Measurement]:
        return {one.contender: one for one in self.measurements if one.case == case}

    @property
    def n_runs(self) -> int:
        return max((len(runs) for one in self.measurements for runs in one.seconds.values()), default=0)

    @property
    def on_cpu(self) -> bool:
        """Whether only ratios mean anything."""
        return self.device.startswith("CPU") or self.rehearsed

    @property
    def reference(self) -> str:
        """Who is timed in the same turns, whatever else there is, and is the measure of the others."""
        return "eager" if self.on_cpu else "copy"

    def ratios(self, one: Measurement, method: str | None = None) -> list[float]:
        """Its time over the reference's, in each run; none where either has no time."""
        reference = self.of(one.case).get(self.reference)
        if reference is None:
            return []
        method = method or one.method
        return [ours / other for ours, other in zip(one.runs(method), reference.runs(method), strict=False)]

    def figure(self, one: Measurement) -> Spread | None:
        """What is shown of it, if there is anything.

        On a CPU its time over eager PyTorch's in the same turns: lower is better. On a GPU the least bytes over its
        time, in per cent of the bytes a second of the large copy: higher is better.
        """
        times = one.seconds.get(one.method or "", [])
        if self.on_cpu:
            reference = self.of(one.case).get(self.reference)
            others = reference.seconds.get(one.method or "", []) if reference else []
            runs = self.ratios(one)
            turns = [[t / other for t, other in zip(*both, strict=True)] for both in zip(times, others, strict=False)]
        else:
            at_best = 100 * one.least_bytes / self.ceilings.get("copy", math.inf)
            runs = [at_best / median(of_run) for of_run in times]
            turns = [[at_best / t for t in of_run] for of_run in times]
        if not runs or not all(runs):
            return None
        if len(runs) > 1:
            return Spread(min(runs), median(runs), max(runs))
        low, _, high = quantiles(turns[0], n=4) if len(turns[0]) > 1 else 3 * turns[0]
        return Spread(min(low, runs[0]), runs[0], max(high, runs[0]))

    def limit(self, case: Case) -> float | None:
        """Of `figure`: what a copy would have that moves the case's least bytes."""
        if not self.on_cpu:
            return 100.0
        copy = self.of(case).get("copy")
        ratios = self.ratios(copy) if copy else []
        return median(ratios) * case.least_bytes / (2 * case.matrix_bytes) if ratios else None


def merged(runs: Sequence[Results]) -> Results:
    """Several runs of the same command as one. Who was wrong in one of them has no time."""
    first, *others = runs
    of = {(one.case, one.contender): one for one in first.measurements}
    for other in others:
        for one in other.measurements:
            whole = of.setdefault((one.case, one.contender), one)
            if whole is one:
                continue
            whole.error = whole.error or one.error
            for method, times in one.seconds.items():
                whole.seconds.setdefault(method, []).extend(times)
            whole.errors = {k: max(v, one.errors.get(k, v)) for k, v in whole.errors.items()}
            whole.peak_bytes = max(filter(None, (whole.peak_bytes, one.peak_bytes)), default=whole.peak_bytes)
    for one in of.values():
        if one.error:
            one.seconds, one.peak_bytes = {}, None
    first.measurements = list(of.values())
    first.environment["after"] = runs[-1].environment.get("after", {})
    return first


def save(results: Results, path: Path) -> None:
    """Whole or not at all: written beside, then renamed. A measurement a line: a file that `git diff` can show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = asdict(results)
    lines = []
    for one in content.pop("measurements"):
        one["seconds"] = {
            method: [[float(f"{t:.5g}") for t in turns] for turns in runs] for method, runs in one["seconds"].items()
        }
        lines.append("  " + json.dumps(one))
    head = json.dumps(content, indent=1).removesuffix("\n}")
    partial = path.with_name(path.name + ".partial")
    partial.write_text(f'{head},\n "measurements": [\n' + ",\n".join(lines) + "\n ]\n}\n")
    os.replace(partial, path)


def load(path: Path) -> Results:
    """Raises BadInput where there is no such file, or it is not of this schema."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise BadInput(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadInput(f"{path} is not JSON: {error}") from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        what = "is no results file of this suite" if schema is None else f"has schema {schema}"
        raise BadInput(f"{path} {what}; this suite reads schema {SCHEMA}")
    try:
        for i, one in enumerate(content["measurements"]):
            content["measurements"][i] = read = Measurement(**one | {"case": Case(*one["case"])})
            times = [t for runs in read.seconds.values() for turns in runs for t in turns]
            if not all(isinstance(t, int | float) and 0 < t < math.inf for t in times):
                raise ValueError(f"times of {read.contender} at {read.case} are not positive numbers")
        return Results(**content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{path} is damaged: {type(error).__name__}: {error}") from None
