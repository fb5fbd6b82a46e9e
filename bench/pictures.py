"""Results as pictures, a row of panels for each mode and a column for each dtype: what changes with the width.

speed-OP.png    on a GPU: the least bytes over the time, as a share of the copy's speed (bench/results.py)
ratio-OP.png    on a CPU: the time over eager PyTorch's of the same turn, median and quartiles
memory-OP.png   the most that a call allocates, in multiples of the logits' bytes

A contender looks the same in each; where it has no figure, its line has a gap. The colours are those of Okabe and Ito
(2008), which people with any colour vision can tell apart; the shapes of the points say it once more.
"""

import io
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

from bench.cases import SMALL, Case
from bench.results import Measurement, Results

MODES = ("step", "forward")
OURS = "#D55E00"
# (colour, point) by name, without "-softmax"
LOOKS = {
    "softxent": (OURS, "o"),
    "softxent-inplace": (OURS, "s"),
    "eager": ("#000000", "x"),
    "compile": ("#0072B2", "^"),
    "liger": ("#009E73", "v"),
    "quack": ("#E69F00", "D"),
    "flash-attn": ("#CC79A7", "P"),
    "transformer-engine": ("#56B4E9", "X"),
    "unsloth": ("#777777", "<"),
    "apex": ("#7A4B2A", ">"),
    "tutorial": ("#56B4E9", "*"),
}
OTHERS = ("#777777", "h")

Figures = tuple[float, float, float]  # quartile, median, quartile


class Picture(NamedTuple):
    name: str
    title: str
    unit: str  # of the vertical axis
    value: Callable[[Results, Measurement], Figures | None]
    level: float  # a line to compare with, and what it is
    level_is: str
    log: bool = False


def pictures(results: Results, folder: Path, say: Callable[[str], None] = print) -> list[Path]:
    """Draws what there is to draw; the files that were written."""
    try:
        import matplotlib
    except ImportError:
        say("no pictures: matplotlib is not installed")
        return []
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for picture in (RATIO if results.on_cpu else SPEED, MEMORY):
        for op in dict.fromkeys(case.op for case in results.cases()):
            with matplotlib.rc_context({"font.size": 9}):
                figure = draw(results, op, picture)
                if figure is not None:
                    paths.append(folder / f"{picture.name}-{op.replace('_', '-')}.png")
                    save(figure, paths[-1])
    return paths


def save(figure: Any, path: Path) -> None:
    """With a palette, a picture of lines is a third of the size."""
    from PIL import Image  # matplotlib needs it too

    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=120, format="png")
    Image.open(drawn).convert("RGB").quantize(64).save(path, optimize=True)


def draw(results: Results, op: str, picture: Picture) -> Any:
    """A matplotlib figure; None where there is no figure to show."""
    from matplotlib.figure import Figure

    lines = dict(lines_of(results, op, picture))
    if not lines:
        return None
    modes = [mode for mode in MODES if any(key[0] == mode for key in lines)]
    dtypes = list(dict.fromkeys(key[1] for key in lines))
    figure = Figure(figsize=(2.2 + 3.6 * len(dtypes), 1.2 + 2.6 * len(modes)), layout="constrained")
    panels = figure.subplots(len(modes), len(dtypes), squeeze=False, sharex=True, sharey="row")
    widths = {width for by_name in lines.values() for line in by_name.values() for width in line}
    handles: dict[str, Any] = {}
    for i, mode in enumerate(modes):
        for j, dtype in enumerate(dtypes):
            axes = panels[i, j]
            axes.axhline(picture.level, color="0.6", linewidth=1, zorder=1)
            place = axes.get_yaxis_transform()  # across in parts of the panel, up in figures
            axes.text(
                1, picture.level, picture.level_is, transform=place, fontsize=7, color="0.4", ha="right", va="bottom"
            )
            axes.set_xscale("log")
            axes.set_xlim(min(widths) / 1.5, 1.5 * max(widths))
            axes.set_title(f"{MODE_WORDS[mode]}, {dtype}", fontsize=9)
            for name, line in lines.get((mode, dtype), {}).items():
                handles[name] = plot(axes, name, line)
            scale(axes, picture.log)
            if i == len(modes) - 1:
                axes.set_xlabel("width (columns of the logits)")
            if j == 0:
                axes.set_ylabel(picture.unit)
    named = [name for name in results.contenders if name in handles]
    figure.suptitle(f"{op}: {picture.title}", fontsize=11)
    figure.legend([handles[name] for name in named], named, loc="outside right upper", frameon=False)
    figure.supxlabel(small_print(results), fontsize=7, color="0.35")
    return figure


MODE_WORDS = {"step": "forward + backward", "forward": "forward alone"}


def lines_of(
    results: Results, op: str, picture: Picture
) -> Iterator[tuple[tuple[str, str], dict[str, dict[int, Figures | None]]]]:
    """By (mode, dtype), and by contender: figures by width, without the small shapes; None where there is none."""
    found: dict[tuple[str, str], dict[str, dict[int, Figures | None]]] = {}
    for one in results.measurements:
        case: Case = one.case
        if case.op != op or case.kind != "mean" or case.mode not in MODES or (case.n_rows, case.n_cols) in SMALL:
            continue
        if one.contender != "copy":
            by_name = found.setdefault((case.mode, case.dtype), {})
            by_name.setdefault(one.contender, {})[case.n_cols] = picture.value(results, one)
    for key, by_name in found.items():
        drawn = {name: line for name, line in by_name.items() if any(line.values())}
        if drawn:
            yield key, drawn


def plot(axes: Any, name: str, line: dict[int, Figures | None]) -> Any:
    """A line with bars from quartile to quartile; ours is drawn over the others. What the legend shows."""
    widths = sorted(line)
    low, middle, high = zip(*(line[width] or (math.nan,) * 3 for width in widths), strict=True)
    bars = [[m - a for m, a in zip(middle, low, strict=True)], [b - m for m, b in zip(middle, high, strict=True)]]
    ours = name.startswith("softxent")
    colour, point = LOOKS.get(name.removesuffix("-softmax"), OTHERS)
    return axes.errorbar(
        widths, middle, bars,
        color=colour, marker=point, markersize=5, label=name, zorder=4 if ours else 3, elinewidth=1,
        linewidth=2.4 if ours else 1.2, linestyle="--" if "inplace" in name else "-", alpha=1 if ours else 0.85,
    )  # fmt: skip


def scale(axes: Any, log: bool) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,g}" if value < 1e6 else f"{value:.0e}")
    axes.xaxis.set_major_formatter(plain)
    axes.tick_params(labelsize=8)
    axes.grid(color="0.9", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 1.5, 2, 3, 5, 7)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)


def small_print(results: Results) -> str:
    run = results.environment
    before = run.get("before", {})
    parts = [f"rehearsal, no GPU: {before.get('cpu', '')}" if results.rehearsed else results.device]
    if results.device == "CPU":
        parts = [f"{before.get('cpu', 'CPU')}, threads {before.get('threads', '?')}"]
    parts += [f"{name} {run[name]}" for name in ("torch", "triton", "softxent") if run.get(name)]
    if run.get("commit"):
        parts.append(f"commit {run['commit']}")
    return ", ".join(parts)


def share(results: Results, one: Measurement) -> Figures | None:
    middle, taken = results.share_of_copy(one), one.median()
    if middle is None or taken is None:
        return None
    return quartiles([100 * middle * taken / turn for turn in one.turns()])


def ratio(results: Results, one: Measurement) -> Figures | None:
    return quartiles(results.ratios(one))


def memory(results: Results, one: Measurement) -> Figures | None:
    multiple = one.peak_bytes / one.case.matrix_bytes if one.peak_bytes is not None and not one.error else None
    return None if multiple is None else (multiple,) * 3


def quartiles(values: list[float]) -> Figures | None:
    if len(values) < 2:
        return (values[0],) * 3 if values else None
    low, _, high = quantiles(values, n=4)
    return low, median(values), high


SPEED = Picture("speed", "share of the speed of a copy", "share of the copy's GB/s (%)", share, 100, "the large copy")
RATIO = Picture("ratio", "time over eager PyTorch's", "time / eager's time", ratio, 1, "", log=True)
MEMORY = Picture("memory", "memory allocated by a call", "peak / bytes of the logits", memory, 1, "B")
