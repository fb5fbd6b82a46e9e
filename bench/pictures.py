"""Results as pictures: a panel for each dtype and mode, in it a column for each shape, the small ones first.

speed-OP.png    on a GPU: the least bytes over the time, as a share of a large copy's speed. Higher is better
ratio-OP.png    on a CPU: the time over eager PyTorch's in the same turns. Lower is better
memory-OP.png   the most that a call allocates, in multiples of the logits' bytes. Lower is better

In a column the contenders stand side by side, so that none hides another. A bar is a figure's noise (results.Spread);
what the table does not show for it is not drawn. The thick grey line is the limit: what a copy would take for the least
bytes, and of memory the results that a call must return. The colours are those of Okabe and Ito (2008), which people
with any colour vision can tell apart; the shapes of the points say it once more.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.cases import DTYPES, SMALL, Case
from bench.results import Measurement, Results, Spread

MODES = {"step": "forward + backward", "forward": "forward alone"}
# (colour, point) by name
LOOKS = {
    "softxent": ("#D55E00", "o"),
    "softxent-inplace": ("#E69F00", "s"),
    "eager": ("#000000", "x"),
    "compile": ("#0072B2", "^"),
    "liger": ("#009E73", "v"),
    "quack": ("#7B3294", "D"),
}
OTHERS = ("#777777", "h")
LIMIT = {"color": "0.6", "linewidth": 4, "solid_capstyle": "butt", "zorder": 1}


class Picture(NamedTuple):
    name: str
    title: str
    unit: str  # of the vertical axis
    value: Callable[[Results, Measurement], Spread | None]
    limit: Callable[[Results, Case], float | None]
    log: bool = False


def pictures(results: Results, folder: Path) -> list[Path]:
    """Draws what there is to draw; the files that were written."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in (RATIO if results.on_cpu else SPEED, MEMORY):
        for op in dict.fromkeys(case.op for case in results.cases()):
            with matplotlib.rc_context({"font.size": 15}):
                figure = draw(results, op, picture)
                if figure is not None:
                    paths.append(folder / f"{picture.name}-{op.replace('_', '-')}.png")
                    figure.savefig(paths[-1], dpi=100)
    return paths


Panels = dict[tuple[str, str], list[Case]]


def panels_of(results: Results, op: str) -> Panels:
    """By (mode, dtype): the cases of the mean, the small shapes first, then by width."""
    cases = [case for case in results.cases() if case.op == op and case.mode in MODES and case.kind == "mean"]
    cases.sort(key=lambda case: (not is_small(case), case.n_cols))
    modes, dtypes = ([key for key in keys if any(key in case for case in cases)] for keys in (MODES, DTYPES))
    return {(m, d): [case for case in cases if (case.mode, case.dtype) == (m, d)] for m in modes for d in dtypes}


def is_small(case: Case) -> bool:
    return (case.n_rows, case.n_cols) in SMALL


def draw(results: Results, op: str, picture: Picture) -> Any:
    """A matplotlib figure; None where there is no figure to show."""
    from matplotlib.figure import Figure

    panels = panels_of(results, op)
    drawn = {
        name
        for cases in panels.values()
        for case in cases
        for name, one in results.of(case).items()
        if name != "copy" and picture.value(results, one)
    }
    everyone = [name for name in results.contenders if name in drawn]
    if not everyone:
        return None
    widest = max(map(len, panels.values()))
    n_dtypes = len({dtype for _, dtype in panels})
    across = n_dtypes if widest <= 8 else 1  # or no two points would be apart
    size = max(13.0, 0.12 * len(everyone) * widest * across), 1.8 + 3.6 * (len(panels) / across)
    figure = Figure(figsize=size, layout="constrained")
    axes_of = figure.subplots(len(panels) // across, across, squeeze=False, sharey="row")
    handles: dict[str, Any] = {}
    for axes, ((mode, dtype), cases) in zip(axes_of.flat, panels.items(), strict=True):
        axes.set_title(f"{MODES[mode]}, {dtype}", fontsize=15)
        handles |= panel(axes, results, cases, everyone, picture)
    for axes in axes_of[:, 0]:
        axes.set_ylabel(picture.unit)
    for axes in axes_of[-1]:
        axes.set_xlabel("columns of the logits; of small batches rows x columns", fontsize=12)
    figure.suptitle(f"{op.replace('_', '-')}: {picture.title}", fontsize=18)
    named = [name for name in (*everyone, "limit") if name in handles]
    figure.legend(
        [handles[name] for name in named], named, loc="outside lower center", frameon=False, ncols=min(5, len(named)),
        title=small_print(results), title_fontsize=11,
    )  # fmt: skip
    return figure


def panel(
    axes: Any, results: Results, cases: Sequence[Case], everyone: Sequence[str], picture: Picture
) -> dict[str, Any]:
    """What the legend shows, by name."""
    handles: dict[str, Any] = {}
    step = 0.8 / len(everyone)
    for i, name in enumerate(everyone):
        found = [(x, one) for x, case in enumerate(cases) if (one := results.of(case).get(name))]
        figures = [(x, figure) for x, one in found if (figure := picture.value(results, one)) and not figure.noisy]
        if not figures:
            continue
        places = [x - 0.4 + (i + 0.5) * step for x, _ in figures]
        middles = [figure.middle for _, figure in figures]
        bars = [
            [figure.middle - figure.low for _, figure in figures],
            [figure.high - figure.middle for _, figure in figures],
        ]
        colour, point = LOOKS.get(name, OTHERS)
        handles[name] = axes.errorbar(
            places, middles, bars, fmt=point, color=colour, markersize=8, elinewidth=1.5, markeredgewidth=1.8, zorder=3
        )
    for x, case in enumerate(cases):
        limit = picture.limit(results, case)
        if limit is not None:
            (handles["limit"],) = axes.plot([x - 0.45, x + 0.45], [limit, limit], **LIMIT)
    axes.set_xticks(range(len(cases)), [label(case) for case in cases], fontsize=12)
    axes.set_xlim(-0.6, len(cases) - 0.4)
    for x in range(1, len(cases)):
        axes.axvline(x - 0.5, color="0.85", linewidth=2 if is_small(cases[x - 1]) and not is_small(cases[x]) else 0.6)
    if len(cases) > 8:
        axes.tick_params("x", rotation=45)
    scale(axes, picture.log)
    return handles


def label(case: Case) -> str:
    """The small shapes whole; of the others, whose rows make up as many bytes, the width."""
    if is_small(case):
        return f"{case.n_rows}\nx {case.n_cols}"
    return f"{case.n_cols // 1000}k" if case.n_cols >= 10000 else str(case.n_cols)


def scale(axes: Any, log: bool) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.grid(axis="y", color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(FixedLocator([m * 10.0**e for e in range(-3, 3) for m in (1, 2, 5)]))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        axes.set_ylim(bottom=0)


def small_print(results: Results) -> str:
    run = results.environment
    before = run.get("before", {})
    parts = [f"rehearsal, no GPU: {before.get('cpu', '')}" if results.rehearsed else results.device]
    if results.device.startswith("CPU"):
        parts.append(f"threads {before.get('threads', '?')}, {before.get('clock', '')}")
    parts += [f"{name} {run[name]}" for name in ("torch", "triton", "softxent", "commit") if run.get(name)]
    return ", ".join(parts)


def memory(results: Results, one: Measurement) -> Spread | None:
    multiple = one.peak_bytes / one.case.matrix_bytes if one.peak_bytes is not None and not one.error else None
    return None if multiple is None else Spread(multiple, multiple, multiple)


def least_memory(results: Results, case: Case) -> float:
    """The gradient, and probabilities: what is returned. What is written over the logits may take less."""
    return (case.mode == "step") + (case.op == "softmax")


SPEED = Picture(
    "speed", "share of a copy's speed, higher is better", "% of the copy's GB/s", Results.figure, Results.limit
)
RATIO = Picture(
    "ratio", "time over eager PyTorch's, lower is better", "time / eager's", Results.figure, Results.limit, log=True
)
MEMORY = Picture(
    "memory", "memory that a call allocates, lower is better", "peak / logits' bytes", memory, least_memory
)
