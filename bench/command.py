"""The command line of the suite. What cannot be used ends with 2 and one clear line.

python -m bench                        this machine: the GPU if there is one, else the CPU
python -m bench cpu                    softxent beside PyTorch on the CPU: ratios, memory
python -m bench gpu --out DIR          all there is to know of a GPU, in nine minutes; again to go on
python -m bench compare A.json B.json  is B slower, or does it take more memory? 1 if so
python -m bench show FILE.json         table and pictures of results, again
python -m bench list                   who is compared, and who is not here
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from bench import contenders, suite
from bench.cases import DTYPES, WIDTHS, Case, sweep
from bench.machine import Cpu, here
from bench.results import BadInput, load

RESULTS = Path(__file__).parent / "results"
MIB = 1 << 20
# Without a GPU: fewer widths, and no torch.compile unless asked for, which would compile for a quarter of an hour.
CPU_WIDTHS = (10, 100, 1000, 32000, 128256)
CPU_CONTENDERS = [name for name in contenders.REGISTRY if not name.startswith("compile")]
PARTS = 16  # of the tests, and of the first calls on a GPU: what is cut off is begun again


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise BadInput(message)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        given = parser().parse_args(arguments)
        run: Callable[[argparse.Namespace], int] = given.run
        return run(given)
    except BadInput as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: what was measured is kept; the same command goes on", file=sys.stderr)
        return 130


def parser() -> Parser:
    summary, _, usage = (__doc__ or "").partition("\n\n")
    raw = argparse.RawDescriptionHelpFormatter
    top = Parser(prog="python -m bench", description=summary, epilog=usage, formatter_class=raw)
    unsaid = {"out": None, "contenders": None, "widths": None, "dtypes": DTYPES, "seconds": None, "size": None}
    top.set_defaults(run=this_machine, minutes=9.0, parts=PARTS, rehearse=False, no_tests=False, **unsaid)
    commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser)

    what = Parser(add_help=False)
    what.add_argument("--contenders", type=names, help=f"of {', '.join(contenders.REGISTRY)}")
    what.add_argument(
        "--widths",
        type=widths,
        help=f"columns, as 10,1000; unless told {_list(CPU_WIDTHS)} on a CPU, {_list(WIDTHS)} on a GPU",
    )
    what.add_argument("--dtypes", type=dtypes, default=DTYPES, help="bfloat16,float32")
    what.add_argument("--seconds", type=positive, help="of timing for each case; 1 on a CPU, 0.2 on a GPU at most")
    what.add_argument("--size", type=positive, help="of the logits, in MiB; 16 on a CPU, 1024 on a GPU")

    cpu = commands.add_parser("cpu", parents=[what], help="softxent beside PyTorch on the CPU")
    cpu.add_argument("--out", type=Path, help=f"folder of the results; {RESULTS.name}/cpu unless told")
    cpu.set_defaults(run=on_cpu)
    gpu = commands.add_parser("gpu", parents=[what], help="all there is to know of a GPU; again to go on")
    gpu.add_argument("--out", type=Path, required=True, help="folder of the results")
    gpu.add_argument("--minutes", type=positive, default=9.0, help="it ends within; 9 unless told")
    gpu.add_argument("--no-tests", action="store_true", help="measure only")
    gpu.add_argument("--parts", type=int, default=PARTS, help=argparse.SUPPRESS)
    gpu.add_argument("--rehearse", action="store_true", help="a CPU stands in for the GPU, and the results say so")
    gpu.set_defaults(run=on_gpu)
    first = commands.add_parser("first", parents=[what], add_help=False)  # a part of gpu, in a process of its own
    first.add_argument("--shard", required=True)
    first.add_argument("--rehearse", action="store_true")
    first.set_defaults(run=first_calls)
    comparison = commands.add_parser("compare", help="is B slower than A, or takes it more memory? 1 if so")
    comparison.add_argument("before", type=Path, metavar="A.json")
    comparison.add_argument("after", type=Path, metavar="B.json")
    comparison.add_argument(
        "--tolerance", type=positive, help="per cent of time that do not matter; 5 of a CUDA graph, 10 of calls"
    )
    comparison.add_argument("--all", action="store_true", help="every contender decides, not softxent's alone")
    comparison.add_argument("--missing-ok", action="store_true", help="cases that B has not are no regression")
    comparison.add_argument("--full", action="store_true", help="list what did not change, too")
    comparison.set_defaults(run=compared)
    shown = commands.add_parser("show", help="table and pictures of results, again")
    shown.add_argument("file", type=Path, metavar="FILE.json")
    shown.set_defaults(run=show)
    commands.add_parser("list", help="who is compared, and who is not here").set_defaults(run=listed)
    return top


def _list(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


def names(text: str) -> list[str]:
    chosen = text.split(",")
    for name in chosen:
        if name not in contenders.REGISTRY:
            raise BadInput(f"unknown contender {name!r}; there are {', '.join(contenders.REGISTRY)}")
    return chosen


def widths(text: str) -> tuple[int, ...]:
    for part in text.split(","):
        if not part.isdecimal() or not 1 <= int(part) <= 1 << 24:
            raise BadInput(f"unknown width {part!r}: a width is a number of columns, from 1 to {1 << 24}")
    return tuple(int(part) for part in text.split(","))


def dtypes(text: str) -> tuple[str, ...]:
    for part in text.split(","):
        if part not in DTYPES:
            raise BadInput(f"unknown dtype {part!r}; there are {', '.join(DTYPES)}")
    return tuple(text.split(","))


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise BadInput(f"{text!r} is not a positive number")
    return value


def say(text: str) -> None:
    print(text, flush=True)


def cases_of(given: argparse.Namespace, size: float, unless_told: tuple[int, ...] = WIDTHS) -> list[Case]:
    found = list(sweep(int((given.size or size) * MIB), given.widths or unless_told, given.dtypes))
    if given.contenders:
        wanted = {"softmax" if name in contenders.SOFTMAX else "cross_entropy" for name in given.contenders}
        found = [case for case in found if case.op in wanted]
    return found


def size_of(given: argparse.Namespace) -> float:
    """MiB of logits on a GPU, or in a rehearsal."""
    return 1 / 64 if given.rehearse else 1024


def this_machine(given: argparse.Namespace) -> int:
    machine = here()
    if machine.device.type == "cpu":
        return on_cpu(given)
    given.out = RESULTS / slug(machine.name)
    return on_gpu(given)


def on_cpu(given: argparse.Namespace) -> int:
    machine = Cpu()
    folder = given.out or RESULTS / "cpu"
    writable(folder)
    path = folder / "results.json"
    if not given.contenders:
        say("torch.compile compiles for long: only with --contenders softxent,eager,compile,...")
    found = suite.begin(machine, path, given.contenders or CPU_CONTENDERS, say)
    suite.run(cases_of(given, 16, CPU_WIDTHS), machine, found, path, given.seconds or 1.0, say)
    return show_in(folder)


def on_gpu(given: argparse.Namespace) -> int:
    from bench import gpu

    writable(given.out)
    return gpu.run(given, cases_of(given, size_of(given)), say)


def first_calls(given: argparse.Namespace) -> int:
    from bench import gpu

    for found in gpu.first_calls(given, cases_of(given, size_of(given))):
        say(gpu.MARK + json.dumps(found))
    return 0


def compared(given: argparse.Namespace) -> int:
    from bench.compare import compare, regressed, report

    before, after = load(given.before), load(given.after)
    tolerance = None if given.tolerance is None else given.tolerance / 100
    changes = compare(before, after, tolerance)
    say(report(changes, before, after, tolerance, given.full))
    return int(regressed(changes, given.all, given.missing_ok))


def show(given: argparse.Namespace) -> int:
    load(given.file)
    return show_in(given.file.parent, given.file)


def show_in(folder: Path, file: Path | None = None) -> int:
    """Table and pictures beside the results."""
    from bench.pictures import pictures
    from bench.table import table

    found = load(file or folder / "results.json")
    (folder / "table.md").write_text(table(found))
    for path in (folder / "table.md", *pictures(found, folder)):
        say(f"wrote {path}")
    return 0


def listed(given: argparse.Namespace) -> int:
    suite.begin(here(), None, contenders.REGISTRY, say)
    return 0


def writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".partial").touch()
        (folder / ".partial").unlink()
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror}") from None


def slug(name: str) -> str:
    """NVIDIA H200 -> nvidia-h200"""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
