"""Results as Markdown: who ran on what, and a table for each kind of work, a row a shape and a column a contender.

On a GPU, a contender's speed is GB/s = the least bytes that the work must move / median time, whatever the contender
moves, and its share of the GB/s of a large copy in the same run. On a CPU it is the ratio to eager PyTorch's time in
the same turns, and the limit that of a copy that moves the least bytes. Both have their noise (results.Spread). Words
that would make a column wide stand below the table.
"""

from collections.abc import Iterable, Iterator

from bench.cases import Case
from bench.doubts import doubts
from bench.results import NOISY, Measurement, Results

LEGEND = {
    "CPU": "Each figure is a time over eager PyTorch's in the same turns, lower is better: **the median of the runs** "
    "(lowest-highest); below it, peak memory. A run is a process of its own. The limit is a copy of the logits, for "
    "the least bytes of the case.",
    "GPU": "Each cell: **share of the large copy's GB/s**, higher is better (quartiles of the turns), GB/s, peak "
    "memory; then the time of a call with the host's launches, and the first call. Share and GB/s are those of a CUDA "
    "graph, of the bytes named at each table; the column copy is a copy of just the case's logits, of the bytes that "
    "it reads and writes.",
}
NO_TIME, WRONG, HIDDEN = "-", "no time", "noisy"


def table(results: Results) -> str:
    kinds: dict[tuple[str, ...], list[Case]] = {}  # in the order in which they were measured
    for case in results.cases():
        kinds.setdefault((case.op, case.mode, case.kind, case.dtype), []).append(case)
    parts = ["\n".join(header(results))]
    for cases in kinds.values():
        cases.sort(key=lambda case: (case.n_cols, case.n_rows))
        parts.append("\n".join(one_table(results, cases)))
    return "\n\n".join(parts) + "\n"


def header(results: Results) -> Iterator[str]:
    run = results.environment
    yield f"# {results.device}"
    yield ""
    if results.rehearsed:
        yield "A rehearsal: a CPU answered the calls that a GPU would. It says nothing about any GPU."
        yield ""
    about = ("softxent", "commit", "python", "torch", "triton", "system", "seed")
    yield "* " + listed((name, run[name]) for name in about if run.get(name) is not None)
    before, after = run.get("before", {}), run.get("after", {})
    if before:
        yield "* " + listed(before.items())
    changed = [(name, value) for name, value in after.items() if before.get(name) != value]
    if changed:
        yield f"* afterwards: {listed(changed)}"
    if "command" in run:
        yield f"* made by `{' '.join(run['command'])}`"
    yield "* versions: " + listed(
        (name, one["version"]) for name, one in results.contenders.items() if "version" in one
    )
    reasons: dict[str, list[str]] = {}
    for name, one in results.contenders.items():
        if "unavailable" in one:
            reasons.setdefault(one_line(one["unavailable"]), []).append(name)
    yield from (f"* not here: {', '.join(names)} ({reason})" for reason, names in reasons.items())
    overwriting = [name for name, one in results.contenders.items() if "overwrites" in one]
    if overwriting:
        yield f"* the gradient is written over the logits by {', '.join(overwriting)}"
    if "copy" in results.ceilings and not results.on_cpu:
        yield f"* the limit: {limit(results)}"
    yield from (f"* **doubtful**: {text}" for text in doubts(results))
    yield ""
    yield LEGEND["CPU" if results.on_cpu else "GPU"]
    if results.on_cpu:
        yield f"Runs: {results.n_runs}. Of one, the brackets hold the quartiles of its turns."
    yield f"Noisy: the figures in brackets are further apart than {100 * NOISY:g} % of the one between them."
    yield "B is the logits' bytes. Memory is what is allocated during a call, at its peak: its result, not its inputs."


def limit(results: Results) -> str:
    """The copy's speed, and what the memory could do."""
    copy, in_theory = results.ceilings["copy"] / 1e9, results.environment.get("before", {}).get("memory_gb_per_s")
    theory = f"{in_theory} GB/s in theory" if isinstance(in_theory, int) else "unknown in theory"
    return f"a large copy reads and writes {copy:.0f} GB/s, in this run; the memory's clock and width allow {theory}"


def one_table(results: Results, cases: list[Case]) -> Iterator[str]:
    case = cases[0]
    measured = {case: results.of(case) for case in cases}
    everyone = [name for name in results.contenders if any(name in of_case for of_case in measured.values())]
    columns = [name for name in everyone if not all(undone(measured[case].get(name)) for case in cases)]
    last = "limit" if results.on_cpu else "copy"
    if any("copy" in of_case for of_case in measured.values()) and (not results.on_cpu or case.mode != "backward"):
        columns.append(last)
    notes = Notes()
    yield f"## {case.op} {case.mode}, {case.dtype}" + ("" if case.kind == "mean" else f", {case.kind}")
    yield ""
    yield f"Bytes: {formula(case)}."
    yield ""
    yield "| rows x width | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for case, of_case in measured.items():
        cells = (cell(results, case, name, of_case.get(name), notes) for name in columns)
        yield f"| {case.n_rows} x {case.n_cols} | " + " | ".join(cells) + " |"
    if notes.numbers:
        yield ""
        yield from (f"{number}. {text}" for text, number in notes.numbers.items())
    for name in everyone:
        if name not in columns:
            words = {one_line(one.error) for of_case in measured.values() if (one := of_case.get(name)) and one.error}
            yield ""
            yield f"Not in this table: {name}, {'; '.join(sorted(words))}."


def undone(one: Measurement | None) -> bool:
    return one is None or (one.error or "").startswith("does not do it")


class Notes:
    """Words below a table, numbered; the same words once."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def mark(self, words: str) -> str:
        number = self.numbers.setdefault(one_line(words), len(self.numbers) + 1)
        return f" <sup>{number}</sup>"


def cell(results: Results, case: Case, name: str, one: Measurement | None, notes: Notes) -> str:
    if name == "limit":
        limit = results.limit(case)
        return "" if limit is None else f"{limit:.2f}"
    if one is None:
        return ""
    if one.error:
        return (NO_TIME if undone(one) else WRONG) + notes.mark(f"{name}: {one.error}")
    memory = "" if one.peak_bytes is None else f"{one.peak_bytes / case.matrix_bytes:.2f} B"
    figure = results.figure(one)
    if figure is None:
        why = f"there is no time of {results.reference(case)} to compare with"
        return lines(NO_TIME + (notes.mark(why) if results.on_cpu else ""), memory)
    if results.on_cpu:
        if name == results.reference(case):
            return lines("1", memory)
        shown = HIDDEN if figure.noisy else f"**{figure.middle:.2f}**"
        return lines(f"{shown} ({figure.low:.2f}-{figure.high:.2f})", memory)
    share, taken, by_calls = results.share_of_copy(one), figure.middle, one.median("calls")
    if share is None:  # backward alone: what was made in forward is only handed over
        return lines(HIDDEN if figure.noisy else f"**{time_of(taken)}**", memory)
    mark = notes.mark(f"no CUDA graph: {one.not_captured}") if one.method == "calls" and one.not_captured else ""
    low, high = (100 * share * taken / end for end in (figure.high, figure.low))
    return lines(
        (HIDDEN if figure.noisy else f"**{100 * share:.0f} %**") + f" ({low:.0f}-{high:.0f}){mark}",
        ", ".join(filter(None, ["" if figure.noisy else f"{one.least_bytes / taken / 1e9:.0f} GB/s", memory])),
        ", ".join(time_of(t) for t in (by_calls, one.first_seconds) if t is not None),
    )


def formula(case: Case) -> str:
    """Case.least_bytes in words."""
    if case.op == "softmax":
        read = {"forward": "B logits", "backward": "B probabilities", "step": "B logits + B probabilities"}[case.mode]
        incoming = "" if case.mode == "forward" else " + B incoming gradient"
        written = {"forward": "B probabilities", "backward": "B gradient", "step": "B probabilities + B gradient"}
        return f"{read}{incoming} + {written[case.mode]}"
    logits = "B / 2 logits" if case.kind == "ignored" else "B logits"
    targets = "B targets" if case.kind == "soft" else "8 n_rows targets"
    again = f" + {logits} again" if case.kind == "scaled" and case.mode == "step" else ""
    return f"{logits} + {targets}{again}" + ("" if case.mode == "forward" else " + B gradient")


def time_of(seconds: float) -> str:
    unit, size = next((one for one in (("s", 1.0), ("ms", 1e-3)) if seconds >= one[1]), ("µs", 1e-6))
    return f"{seconds / size:.3g} {unit}"


def lines(*parts: str) -> str:
    return "<br>".join(part for part in parts if part)


def listed(items: Iterable[tuple[str, object]]) -> str:
    return ", ".join(f"{name} {one_line(str(value))}" for name, value in items)


def one_line(text: str) -> str:
    """Of words that may be anything: in a table, a bar would end the cell."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
