"""Two results files side by side: what has become slower, with confidence intervals, and what takes more memory.

Bare times of two runs on shared machines cannot be compared; times relative to what ran in the same turn can. So, of a
contender at a case, with r_i = its time over the reference's in turn i (eager PyTorch's on a CPU, a copy's on a GPU),

    change = median(r in B) / median(r in A)                                             above 1: B is slower

once for each method: "graph", the kernels' time, and "calls", with the host in it. Between different processors, calls
are not compared.

Its interval: exp(log change -+ t s), where s is the standard deviation of log change over RESAMPLES bootstrap samples
of both runs. Noise comes in bursts of several turns, so what is drawn is blocks of n^(1/3) neighbouring turns, which
is the rate at which the variance is estimated best (Hall, Horowitz and Jing, Biometrika 1995). t is Student's, with as
many degrees of freedom as there are blocks, less one in each run, and such that all intervals together, of both
methods, hold with probability LEVEL (Bonferroni); quantiles of the samples themselves would need millions of them.

What differs between whole runs, and not between turns, as where memory lies or what a neighbour does for minutes, is in
no interval: that is what the tolerance is for. It is larger where the host is timed.

Peak memory is what a call asks for, not what an allocator makes of it, and the same in each run of the same code: there
is no interval. A growth counts that is more than MEMORY, so that a few numbers more for each block of rows are nobody's
concern, and more than MEMORY_BYTES: a page of a CPU's, or eight of the smallest pieces that CUDA's allocator hands out,
below which as much is taken from the system as before. What a small shape hides so, a large one shows.

    slower         the whole interval is above 1 + tolerance
    more memory
    faster         the whole interval is below 1 / (1 + tolerance)
    less memory
    no slower      the whole interval is below 1 + tolerance
    unclear        none of these: the machine was too noisy, or the time too short
    no more memory
    broken         an error, or no CUDA graph, where there was none, or one
    missing        not measured in B
    mended         an error in A, and a time in B
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from bench.cases import Case
from bench.doubts import doubts
from bench.results import BadInput, Measurement, Results

LEVEL = 0.99
RESAMPLES = 1000
TOLERANCE = {"graph": 0.05, "calls": 0.10}  # by method
MEMORY, MEMORY_BYTES = 0.01, 4096
UNCHANGED = ("no slower", "no more memory")
VERDICTS = ("broken", "missing", "slower", "more memory", "unclear", "mended", "faster", "less memory", *UNCHANGED)


@dataclass
class Change:
    case: Case
    contender: str
    verdict: str
    figure: str = ""  # "graph", "calls" or "memory"
    ratio: float | None = None  # what it is in B over that in A
    low: float | None = None  # of a time
    high: float | None = None
    note: str = ""

    @property
    def own(self) -> bool:
        return self.contender.startswith("softxent")


def compare(a: Results, b: Results, tolerance: float | None = None) -> list[Change]:
    """Every contender at every case of A. Raises BadInput where the two cannot be compared."""
    check_comparable(a, b)
    before, after = ({(one.case, one.contender): one for one in results.measurements} for results in (a, b))
    changes, timed = [], []
    for (case, contender), one in before.items():
        if contender == "copy" or contender == a.reference(case):
            continue
        other = after.get((case, contender))
        change = in_kind(one, other, b)
        if change is not None:
            changes.append(change)
        if other is None or one.error or other.error:
            continue
        changes += in_memory(one, other)
        for method in one.seconds:
            if method not in other.seconds or (method == "calls" and other_hosts(a, b)):
                continue
            old, new = a.ratios(one, method), b.ratios(other, method)
            if old and new:
                timed.append((case, contender, method, old, new))
            else:
                note = f"no times of {a.reference(case)} in {'B' if old else 'A'}"
                changes.append(Change(case, contender, "unclear", method, note=note))
    rng = np.random.default_rng(0)
    for case, contender, method, old, new in timed:
        change = Change(case, contender, "", method, *interval(old, new, len(timed), rng))
        change.verdict = verdict(change, TOLERANCE[method] if tolerance is None else tolerance)
        changes.append(change)
    return sorted(changes, key=lambda change: (not change.own, VERDICTS.index(change.verdict)))


def regressed(changes: Iterable[Change], everyone: bool = False, missing_ok: bool = False) -> bool:
    """Whether softxent, or everyone, is slower anywhere, or takes more memory, or is broken, or missing."""
    bad = {"slower", "more memory", "broken"} | (set() if missing_ok else {"missing"})
    return any(change.verdict in bad for change in changes if change.own or everyone)


def check_comparable(a: Results, b: Results) -> None:
    for what, one, other in zip(("devices", "processors", "threads"), measured_on(a), measured_on(b), strict=True):
        if one != other:
            raise BadInput(f"results of different {what} cannot be compared: {one} and {other}")
    if not set(a.cases()) & set(b.cases()):
        raise BadInput("the two files have no case in common")


def measured_on(results: Results) -> tuple[str, Any, Any]:
    """Even ratios of a CPU are its own. On a GPU the host is no part of the kernels' figure."""
    before = results.environment.get("before", {}) if results.on_cpu else {}
    name = f"a rehearsal ({results.device})" if results.rehearsed else results.device
    return name, before.get("cpu"), before.get("threads")


def other_hosts(a: Results, b: Results) -> bool:
    """Whether GPUs had other processors beside them."""
    one, other = (results.environment.get("before", {}).get("cpu") for results in (a, b))
    return bool(one != other)


def in_kind(a: Measurement, b: Measurement | None, to: Results) -> Change | None:
    """A change that is no matter of figures."""
    if b is None:
        why = to.contenders.get(a.contender, {"unavailable": "not asked for"}).get("unavailable", "")
        return None if a.error else Change(a.case, a.contender, "missing", note=why)
    if b.error and not a.error:
        return Change(a.case, a.contender, "broken", note=b.error)
    if a.error and not b.error:
        return Change(a.case, a.contender, "mended", note=a.error)
    if a.method == "graph" and b.method == "calls":
        return Change(a.case, a.contender, "broken", "graph", note=f"no CUDA graph any more: {b.not_captured}")
    return None


def in_memory(a: Measurement, b: Measurement) -> Iterator[Change]:
    if a.peak_bytes is None or b.peak_bytes is None:
        return
    least, most = sorted((a.peak_bytes, b.peak_bytes))
    word = "no more memory"
    if most - least > max(MEMORY_BYTES, MEMORY * least):
        word = "more memory" if b.peak_bytes > a.peak_bytes else "less memory"
    ratio = b.peak_bytes / a.peak_bytes if a.peak_bytes else None
    note = f"{a.peak_bytes} and {b.peak_bytes} bytes"
    yield Change(a.case, a.contender, word, "memory", ratio, note=note)


def interval(a: list[float], b: list[float], n_intervals: int, rng: np.random.Generator) -> tuple[float, float, float]:
    """The change, and the ends of one of so many intervals."""
    old, new = np.log(a), np.log(b)
    change = float(np.median(new) - np.median(old))
    s = float(np.std(resampled_medians(new, rng) - resampled_medians(old, rng)))
    degrees = sum(math.ceil(len(turns) / block_of(len(turns))) - 1 for turns in (a, b))
    half = student(1 - (1 - LEVEL) / 2 / n_intervals, max(1, degrees)) * s
    return math.exp(change), math.exp(change - half), math.exp(change + half)


def block_of(n_turns: int) -> int:
    return math.ceil(math.cbrt(n_turns))


def resampled_medians(turns: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[RESAMPLES] medians of blocks of neighbouring turns, drawn with replacement; the first turn follows the last."""
    n = len(turns)
    block = block_of(n)
    starts = rng.integers(n, size=(RESAMPLES, math.ceil(n / block), 1))
    drawn = (starts + np.arange(block)) % n
    drawn_turns = np.sort(turns[drawn.reshape(RESAMPLES, -1)[:, :n]], axis=1)  # many times as fast as np.median
    medians: np.ndarray = (drawn_turns[:, (n - 1) // 2] + drawn_turns[:, n // 2]) / 2
    return medians


def student(probability: float, degrees: int) -> float:
    """Student's t quantile, by Abramowitz and Stegun 26.7.5; with 6 degrees of freedom up to 4 % too small."""
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def verdict(change: Change, tolerance: float) -> str:
    assert change.low is not None and change.high is not None
    if change.low > 1 + tolerance:
        return "slower"
    if change.high < 1 / (1 + tolerance):
        return "faster"
    return "no slower" if change.high <= 1 + tolerance else "unclear"


def report(changes: list[Change], a: Results, b: Results, tolerance: float | None = None, full: bool = False) -> str:
    """For the terminal, and Markdown: what has changed, or with `full` everything, and how many of each."""
    reference = "eager PyTorch's" if a.on_cpu else "a copy's"
    methods = [method for method in TOLERANCE if any(change.figure == method for change in changes)]
    tolerances = " and ".join(
        f"{100 * (TOLERANCE[method] if tolerance is None else tolerance):g} % ({method})" for method in methods
    )
    n_intervals = sum(change.low is not None for change in changes)
    text = [
        f"{a.device}: commit {b.environment.get('commit')} against {a.environment.get('commit')}. "
        f"Each time is relative to {reference} of the same turn.",
        f"Slower is what is slower by more than {tolerances} for certain: the {n_intervals} intervals hold together at "
        f"{100 * LEVEL:g} %. More memory is more than {100 * MEMORY:g} % and {MEMORY_BYTES} bytes more.",
    ]
    for name in ("torch", "triton"):
        old, new = a.environment.get(name), b.environment.get(name)
        if old != new:
            also = ", eager PyTorch's too" if a.on_cpu and name == "torch" else ""
            text.append(f"Not the same {name}, {old} and {new}: some of it may be {name}'s doing{also}.")
    if other_hosts(a, b):
        text.append("Not the same processor beside the GPU: times by calls, which have the host in them, are left out.")
    for name, results in (("A", a), ("B", b)):
        text += [f"Doubtful in {name}: {doubt}." for doubt in doubts(results)]
    shown = [change for change in changes if full or change.verdict not in (*UNCHANGED, "unclear")]
    if shown:
        text += ["", "| | contender | case | figure | B over A | |", "|---|---|---|---|---|---|", *rows(shown)]
    text.append("")
    for contender in dict.fromkeys(change.contender for change in changes):
        count = Counter(change.verdict for change in changes if change.contender == contender)
        text.append(f"* {contender}: " + ", ".join(f"{count[word]} {word}" for word in VERDICTS if count[word]))
    new_cases = len(set(b.cases()) - set(a.cases()))
    if new_cases:
        text.append(f"* {new_cases} cases of B are not in A")
    return "\n".join(text) + "\n"


def rows(changes: list[Change]) -> Iterator[str]:
    """A line each; but one for a contender of which all is missing for one reason."""
    at_all = {change.contender: {c.verdict for c in changes if c.contender == change.contender} for change in changes}
    said = set()
    for change in changes:
        what, case = change.verdict, str(change.case)
        if change.note and at_all[change.contender] == {"missing"} and not change.own:
            if change.contender in said:
                continue
            said.add(change.contender)
            case = "every case"
        taken = "" if change.ratio is None else f"{change.ratio:.2f}"
        if change.low is not None:
            taken += f" ({change.low:.2f} to {change.high:.2f})"
        note = change.note.replace("|", "/")
        yield f"| {what} | {change.contender} | {case} | {change.figure} | {taken} | {note} |"
