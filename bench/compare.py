"""What has become slower, or takes more memory, from one version to another, and how sure that is.

What differs from process to process, as where memory lies, differs by more than what is seen within one. So the unit is
the run: a process of its own, of whose turns the median is taken. Of a contender at a case, with T a run's figure,

    change = exp(mean(log T in B) - mean(log T in A))                                    above 1: B is slower

    compare --run A B        T are seconds. Run i of A and run i of B went side by side (bench/paired.py), so their
                             differences are what varies: s = sd(log T_B - log T_A) / sqrt(n), n - 1 degrees of freedom
    compare A.json B.json    T is relative to eager PyTorch's in the same turns, on a GPU to a copy's.
                             s^2 = sd_A^2 / n_A + sd_B^2 / n_B, degrees of freedom by Welch and Satterthwaite

The interval: exp(log change -+ t s), t Student's, such that all intervals of a comparison hold together with
probability LEVEL (Bonferroni). One run has no spread between runs: then there is no interval, and no verdict.

    slower         the interval is above 1, and reaches beyond 1 + tolerance
    faster         the interval is below 1, and reaches beyond 1 / (1 + tolerance)
    no slower      by more than the tolerance: the interval ends below 1 + tolerance
    too noisy      to tell: none of these
    more memory    the same in each run of the same code; counted from MEMORY and MEMORY_BYTES on: a page of a CPU's, or
    less memory    eight of the smallest pieces that CUDA's allocator hands out
    no more memory
    broken         an error, or no CUDA graph, where there was none, or one
    missing        not measured in B
    mended         an error in A, and a time in B
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

from bench.cases import Case
from bench.doubts import doubts
from bench.results import BadInput, Measurement, Results

LEVEL = 0.95
TOLERANCE = 0.05
MEMORY, MEMORY_BYTES = 0.01, 4096
UNCHANGED = ("no slower", "no more memory")
VERDICTS = ("broken", "missing", "slower", "more memory", "too noisy", "mended", "faster", "less memory", *UNCHANGED)
SAME = {  # what must be: key of the environment, and of its "before"
    "torch": "torch",
    "triton": "Triton",
    "cpu": "processor",
    "instructions": "instruction set",
    "threads": "number of threads",
    "clock": "clock",
}


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


def compare(a: Results, b: Results, tolerance: float = TOLERANCE, paired: bool = False) -> list[Change]:
    """Every contender at every case of A."""
    before, after = ({(one.case, one.contender): one for one in results.measurements} for results in (a, b))
    changes: list[Change] = []
    timed: list[tuple[Change, list[float], list[float]]] = []
    for (case, contender), one in before.items():
        if contender == "copy" or (contender == a.reference and not paired):
            continue
        other = after.get((case, contender))
        change = in_kind(one, other, b)
        if change is not None:
            changes.append(change)
        if other is None or one.error or other.error:
            continue
        changes += in_memory(one, other)
        for method in one.seconds:
            if method in other.seconds:
                old = one.runs(method) if paired else a.ratios(one, method)
                new = other.runs(method) if paired else b.ratios(other, method)
                timed.append((Change(case, contender, "too noisy", method), old, new))
    for change, old, new in timed:
        judge(change, old, new, len(timed), tolerance, paired)
        changes.append(change)
    return sorted(changes, key=lambda change: (not change.own, VERDICTS.index(change.verdict)))


def judge(change: Change, old: Sequence[float], new: Sequence[float], n: int, tolerance: float, paired: bool) -> None:
    """Ratio, interval (one of n) and verdict of a time."""
    if not old or not new:
        change.note = f"no time of the reference in {'B' if old else 'A'}"
        return
    change.ratio = math.exp(fmean(map(math.log, new)) - fmean(map(math.log, old)))
    if min(len(old), len(new)) < 2:
        change.note = "one run: what differs between runs is not known"
        return
    change.low, change.high = interval(old, new, 1 - (1 - LEVEL) / n, paired)
    if change.low > 1 and change.high > 1 + tolerance:
        change.verdict = "slower"
    elif change.high < 1 and change.low < 1 / (1 + tolerance):
        change.verdict = "faster"
    elif change.high <= 1 + tolerance:
        change.verdict = "no slower"


def interval(old: Sequence[float], new: Sequence[float], level: float, paired: bool) -> tuple[float, float]:
    from scipy.stats import t

    a, b = ([math.log(value) for value in values] for values in (old, new))
    middle = fmean(b) - fmean(a)
    samples = [[y - x for x, y in zip(a, b, strict=True)]] if paired else [a, b]
    variances = [variance(sample) / len(sample) for sample in samples]
    s2 = sum(variances)
    terms = (v**2 / (len(sample) - 1) for v, sample in zip(variances, samples, strict=True))
    degrees = s2**2 / sum(terms) if s2 else 1
    half = float(t.ppf((1 + level) / 2, degrees)) * math.sqrt(s2)
    return math.exp(middle - half), math.exp(middle + half)


def check_comparable(a: Results, b: Results) -> None:
    """Raises BadInput where figures of the two mean different things."""
    found = []
    if a.device != b.device or a.rehearsed != b.rehearsed:
        found.append(f"device ({a.device}, {b.device})")
    for key, word in SAME.items():
        old, new = (r.environment.get(key, r.environment.get("before", {}).get(key)) for r in (a, b))
        if old != new:
            found.append(f"{word} ({old}, {new})")
    if found:
        raise BadInput(f"not the same {', '.join(found)}: what changed could be that; --anyway compares them")


def regressed(changes: Iterable[Change]) -> bool:
    """Whether softxent is slower anywhere, or takes more memory, or is broken, or missing."""
    return any(change.verdict in ("slower", "more memory", "broken", "missing") for change in changes if change.own)


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


def verdict(changes: Iterable[Change]) -> str:
    """Of all of softxent's times together, in one word: the worst."""
    words = {change.verdict for change in changes if change.low is not None and change.own}
    return next((word for word in VERDICTS if word in words), "too noisy")


def report(
    changes: list[Change],
    a: Results,
    b: Results,
    tolerance: float = TOLERANCE,
    paired: bool = False,
    full: bool = False,
) -> str:
    """For the terminal, and Markdown: what has changed, or with `full` everything, and how many of each."""
    of = "seconds, side by side" if paired else f"times over {'eager PyTorch' if a.on_cpu else 'a copy'}'s"
    n = sum(change.low is not None for change in changes)
    text = [
        f"{a.device}: B, commit {b.environment.get('commit')}, against A, commit {a.environment.get('commit')}",
        f"{of[0].upper()}{of[1:]}; {a.n_runs} runs of A, {b.n_runs} of B. Above 1, B is slower. A change counts from "
        f"{100 * tolerance:g} % of time on, and {100 * MEMORY:g} % and {MEMORY_BYTES} bytes of memory; the {n} "
        f"intervals hold together at {100 * LEVEL:g} %.",
    ]
    for name, results in (("A", a), ("B", b)):
        text += [f"Doubtful in {name}: {doubt}." for doubt in (() if paired else doubts(results))]
    gone = [change for change in changes if change.verdict == "missing" and not change.own]  # peers': counted below
    shown = [change for change in changes if change not in gone and (full or change.verdict not in UNCHANGED)]
    if shown:
        text += ["", table(shown)]
    text.append("")
    for contender in dict.fromkeys(change.contender for change in changes):
        count = Counter(change.verdict for change in changes if change.contender == contender)
        text.append(f"* {contender}: " + ", ".join(f"{count[word]} {word}" for word in VERDICTS if count[word]))
    new_cases = len(set(b.cases()) - set(a.cases()))
    if new_cases:
        text.append(f"* {new_cases} cases of B are not in A")
    words = {
        "no slower": f"B is no slower by more than {100 * tolerance:g} %",
        "too noisy": "too noisy to tell; more --runs, or a quieter machine",
        "slower": "B is slower",
        "faster": "B is faster",
    }
    return "\n".join([*text, "", f"softxent's time: {words[verdict(changes)]}"]) + "\n"


def table(changes: list[Change]) -> str:
    from tabulate import tabulate

    rows = []
    for change in changes:
        taken = "" if change.ratio is None else f"{change.ratio:.3f}"
        if change.low is not None:
            taken += f" ({change.low:.3f} to {change.high:.3f})"
        note = change.note.replace("|", "/")
        rows.append([change.verdict, change.contender, str(change.case), change.figure, taken, note])
    headers = ["", "contender", "case", "figure", "B over A", ""]
    text: str = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    return text
