"""Faults planted in the PTX of the kernels, one at a time, and who notices: python tests/ptx_mutants.py [CASE ...]

Each mutant of a case's longest kernel runs in the emulator. It is found if there is a fault, or another result. What
survives is printed, with its place: it has to be a change of nothing, or the emulator is blind to it. A change of
nothing are a guard that is true of all, a comparison of what is never equal, another shift by a maximum, and the
barrier of narrow_rows.py where rows are not overwritten in place.
"""

import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    for folder in ("kernels", "tests", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch

from emulated_cases import CASES, outputs
from ptx import Unmodelled

SOME: tuple[str, ...] = (
    "10",
    "10, one launch",
    "100, all options",
    "301",
    "1000 bfloat16, in place",
    "1000 bfloat16, probabilities",
)
SOME += ("2049, all options", "3001 bfloat16, stats", "32000 bfloat16", "50257 bfloat16", "128256")
HALF = "setp.lt.u32 %half, %tid.x, 16; @%half "  # some of the first warp


class Mutation(NamedTuple):
    name: str
    lines: str  # which it is done to
    change: Callable[[str], str]
    most: int = 6  # of a kernel


def turned(line: str) -> str:
    other = {"lt": "le", "ge": "gt", "eq": "ne", "gt": "ge", "le": "lt", "ne": "eq"}
    return re.sub(r"setp\.(\w\w)", lambda found: "setp." + other[found[1]], line)


def moved(by: int) -> Callable[[str], str]:
    """The address."""
    address = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(\d+))?\s*\]")
    return lambda line: address.sub(lambda found: f"[{found[1]}+{int(found[2] or 0) + by}]", line)


def farther(line: str) -> str:
    return re.sub(r", (\d+), 31", lambda found: f", {int(found[1]) * 2 % 32 or 1}, 31", line)


def without(pattern: str, instead: str = "") -> Callable[[str], str]:
    return lambda line: re.sub(pattern, instead, line)


def by_some(line: str) -> str:
    return HALF + line.strip()


MUTATIONS = (
    Mutation("barrier dropped", r"\s*bar\.sync", without(".*"), 1000),
    Mutation("barrier of some threads", r"\s*bar\.sync", by_some),
    Mutation("shuffle by another distance", r"\s*shfl.*bfly", farther),
    Mutation("shuffle of some lanes", r"\s*shfl", by_some),
    Mutation("shared store moved", r".*st\.shared", moved(4)),
    Mutation("shared store dropped", r".*st\.shared", without(".*")),
    Mutation("shared load moved", r".*ld\.shared", moved(4)),
    Mutation("guard of a global access dropped", r"\s*@!?%p\d+ (ld|st)\.global", without(r"@!?%p\d+ ")),
    Mutation("wide access moved by 4 bytes", r".*(ld|st)\.global\S*\.v[24]", moved(4)),
    Mutation("global store moved by 16 bytes", r".*st\.global", moved(16)),
    Mutation("addend dropped", r"\s*fma\.rn\.f32", without(r"fma\.rn\.f32(.*), [^,;]+;", r"mul.f32\1;")),
    Mutation("comparison turned", r"\s*setp\.(lt|ge|eq|gt|le|ne)\.", turned),
)


def mutants(ptx: str) -> Iterator[tuple[Mutation, int, str]]:
    lines = ptx.split("\n")
    for mutation in MUTATIONS:
        places = [k for k, line in enumerate(lines) if re.match(mutation.lines, line)]
        for k in places[:: max(1, -(-len(places) // mutation.most))]:
            changed = mutation.change(lines[k])
            if changed != lines[k]:
                text = "\n".join([*lines[:k], changed, *lines[k + 1 :]])
                yield mutation, k, text.replace(".reg .pred", ".reg .pred %half;\n.reg .pred", 1)


def run(name: str, change: Callable[[str, str], str] | None = None) -> tuple[list[torch.Tensor], set[str], str]:
    """Results, kinds of faults, and the PTX of the longest kernel."""
    from ptx.emulated import Emulated

    with Emulated(CASES[name].arch, change=change) as launches:
        results = list(outputs(CASES[name], "ours").values())
    longest = max(launches, key=lambda launch: launch.report.lanes.sum())
    kinds = {kind for launch in launches for kind in launch.report.kinds}
    return results, kinds, longest.ptx


def replaced(ptx: str, by: str, _: str, given: str) -> str:
    return by if given == ptx else given


def place(ptx: str, line: int) -> str:
    """The last .loc before a line says the source."""
    lines = ptx.split("\n")[: line + 1]
    source = next((text for text in reversed(lines) if ".loc" in text and "//" in text), "//")
    return f"{source.split('//', 1)[1].strip()}: {lines[-1].strip()}"


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    table: dict[str, Counter[str]] = defaultdict(Counter)
    survivors = []
    for name in sys.argv[1:] or SOME:
        right, faults, ptx = run(name)
        assert not faults, faults
        for mutation, line, text in mutants(ptx):
            try:
                results, kinds, _ = run(name, partial(replaced, ptx, text))
            except Unmodelled:
                kinds, results = {"not modelled"}, right
            same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(right, results, strict=True))
            found = "+".join(sorted(kinds)) or ("survived" if same else "another result")
            table[mutation.name][found] += 1
            if found == "survived":
                survivors.append(f"{name}, {mutation.name}, {place(ptx, line)}")
        print(f"{name}: {sum(sum(x.values()) for x in table.values())} mutants so far", file=sys.stderr, flush=True)
    print("| fault planted | mutants | found by a fault | by another result alone | survived |")
    print("|---|---|---|---|---|")
    for what, counted in table.items():
        alone, survived = counted["another result"], counted["survived"]
        total = sum(counted.values())
        print(f"| {what} | {total} | {total - alone - survived} | {alone} | {survived} |")
    print(*(f"\nsurvived: {one}" for one in survivors))


if __name__ == "__main__":
    main()
