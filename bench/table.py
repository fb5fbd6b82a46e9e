"""Results as Markdown: who ran on what, and a table for each kind of work, a row a shape and a column a contender.

Figures and their noise are `Results.figure`. Words that would make a column wide stand below the table.
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
    "graph, of the case's least bytes; the column copy is a copy of just the case's logits, of the bytes that it reads "
    "and writes.",
}
LEAST = "The least bytes: each input read once, each output written once (Case.least_bytes, in bench/cases.py)."
MEMORY = "B is the logits' bytes. Memory is what is allocated during a call, at its peak: its result, not its inputs."
ABOUT = ("softxent", "commit", "python", "torch", "triton", "system", "seed")  # of the environment
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
    run, cpu = results.environment, results.on_cpu
    before, after = run.get("before", {}), run.get("after", {})
    yield f"# {results.device}\n"
    if results.rehearsed:
        yield "A rehearsal: a CPU answered the calls that a GPU would. It says nothing about any GPU.\n"
    yield "* " + listed((name, run[name]) for name in ABOUT if run.get(name) is not None)
    if before:
        yield "* " + listed(before.items())
    changed = [(name, value) for name, value in after.items() if before.get(name) != value]
    if changed:
        yield f"* afterwards: {listed(changed)}"
    if "command" in run:
        yield f"* made by `{' '.join(run['command'])}`"
    for name, one in results.contenders.items():
        over = ", which writes the loss's gradient over the logits" if "overwrites" in one else ""
        yield f"* {name}: " + (one_line(one["version"] + over if "version" in one else one["unavailable"]))
    if "copy" in results.ceilings and not cpu:
        yield f"* the limit: {limit(results)}"
    yield from (f"* **doubtful**: {text}" for text in doubts(results))
    yield f"\n{LEGEND['CPU' if cpu else 'GPU']}"
    if cpu:
        yield f"Runs: {results.n_runs}. Of one, the brackets hold the quartiles of its turns."
    yield f"Noisy: the figures in brackets are further apart than {100 * NOISY:g} % of the one between them."
    yield f"{LEAST}\n{MEMORY}"


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
    if any("copy" in of_case for of_case in measured.values()):
        columns.append("limit" if results.on_cpu else "copy")
    notes: dict[str, int] = {}  # words below the table, numbered; the same words once
    yield f"## {case.op} {case.mode}, {case.dtype}" + ("" if case.kind == "mean" else f", {case.kind}")
    yield "\n| rows x width | " + " | ".join(columns) + " |"
    yield "|---|" + "---|" * len(columns)
    for case, of_case in measured.items():
        cells = (cell(results, case, name, of_case.get(name), notes) for name in columns)
        yield f"| {case.n_rows} x {case.n_cols} | " + " | ".join(cells) + " |"
    if notes:
        yield ""
        yield from (f"{number}. {text}" for text, number in notes.items())
    for name in everyone:
        if name not in columns:
            words = {one_line(one.error) for of_case in measured.values() if (one := of_case.get(name)) and one.error}
            yield f"\nNot in this table: {name}, {'; '.join(sorted(words))}."


def undone(one: Measurement | None) -> bool:
    return one is None or (one.error or "").startswith("does not do it")


def noted(words: str, notes: dict[str, int]) -> str:
    return f" <sup>{notes.setdefault(one_line(words), len(notes) + 1)}</sup>"


def cell(results: Results, case: Case, name: str, one: Measurement | None, notes: dict[str, int]) -> str:
    if name == "limit":
        limit = results.limit(case)
        return "" if limit is None else f"{limit:.2f}"
    if one is None:
        return ""
    if one.error:
        return (NO_TIME if undone(one) else WRONG) + noted(f"{name}: {one.error}", notes)
    figure = results.figure(one)
    memory = "" if one.peak_bytes is None else f"{one.peak_bytes / case.matrix_bytes:.2f} B"
    if figure is None:
        return lines(NO_TIME + noted(f"there is no time of {results.reference} to compare with", notes), memory)
    if name == results.reference and results.on_cpu:
        return lines("1", memory)
    unit, digits = ("", 2) if results.on_cpu else (" %", 0)
    low, middle, high = (f"{value:.{digits}f}" for value in figure)
    shown = (HIDDEN if figure.noisy else f"**{middle}{unit}**") + f" ({low}-{high})"
    if results.on_cpu:
        return lines(shown, memory)
    if one.method == "calls" and one.not_captured:
        shown += noted(f"no CUDA graph: {one.not_captured}", notes)
    speed = "" if figure.noisy else f"{figure.middle / 100 * results.ceilings['copy'] / 1e9:.0f} GB/s"
    times = (*one.runs("calls"), one.first_seconds)
    return lines(
        shown,
        ", ".join(filter(None, [speed, memory])),
        ", ".join(time_of(t) for t in times if t is not None),
    )


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
