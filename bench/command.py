"""Is the fused softmax and cross-entropy right, how fast is it, and how much memory does it take? Beside PyTorch, and
beside the other libraries that are installed. Each contender's loss and gradient are held against float64 first; who is
wrong gets no time. Then all take turns, in several processes; a figure is shown with its noise, or called noisy, and
beside it is the limit: what a copy of the logits takes. Exit status: 0, or 1 regressed, 2 unusable input, 3 time is up.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

from bench import contenders, results, suite
from bench.cases import CPU_WIDTHS, DTYPES, WIDTHS, Case, sweep
from bench.compare import TOLERANCE
from bench.machine import Cpu, Machine, here, settle
from bench.results import BadInput, load

USAGE = """
examples:
  python -m bench                          this machine: its GPU if there is one, else its CPU, in some seven minutes,
                                           and the first time, when torch.compile compiles, in twelve
  python -m bench cpu --only '' --publish  all cases, twice as long, and put the results where git sees them
  python -m bench gpu --minutes 9          a GPU; the same command goes on where it was cut off
  python -m bench compare --run main .     is this checkout slower than that commit, or takes it more memory? Each of
                                           --runs takes half a minute to a minute
  python -m bench compare A.json B.json    the same of two results
"""
HERE = Path(__file__).parent
RESULTS, RUNS = HERE / "results", HERE / "runs"  # what git keeps, and what it ignores
PUBLISHED = ("*.png", "table.md", "results.json")
MEAN = "cross_entropy mean"  # the cases that matter most
MIB = 1 << 20


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
    raw = argparse.RawDescriptionHelpFormatter
    what = Parser(add_help=False)
    others = "or softxent:group, softxent:WARPS:GRANULES:HELD"
    known = contenders.REGISTRY
    what.add_argument("--contenders", type=among("contender", known), help=f"{_list(known)}; {others}")
    what.add_argument("--widths", type=widths, help=f"columns; {_list(CPU_WIDTHS)} on a CPU, {_list(WIDTHS)} on a GPU")
    what.add_argument("--dtypes", type=among("dtype", DTYPES), default=DTYPES, help=_list(DTYPES))
    what.add_argument("--only", metavar="WORDS", help=f"cases with these in their name; {MEAN!r}, on a GPU all of them")
    what.add_argument("--size", type=positive(float), help="of the logits, in MiB; 16 on a CPU, 1024 on a GPU")
    what.add_argument(
        "--runs", type=positive(int), help="processes: noise is what differs between them; 5, of compare 6"
    )
    what.add_argument(
        "--threads", type=positive(int), default=1, help="of a CPU; 1, by CPU time, on one core; else wall time"
    )
    suite_of = Parser(add_help=False, parents=[what])
    suite_of.add_argument(
        "--seconds", type=positive(float), help="of timing a case in each run; 0.3 on a CPU, 0.2 on a GPU"
    )
    suite_of.add_argument("--out", type=Path, help="folder of the results; bench/runs/MACHINE, which git ignores")
    suite_of.add_argument("--publish", action="store_true", help="copy them to bench/results/MACHINE, which git keeps")
    on_a_gpu = Parser(add_help=False)
    on_a_gpu.add_argument("--minutes", type=positive(float), default=9.0, help="it ends within; 9")
    on_a_gpu.add_argument("--rehearse", action="store_true", help="a CPU stands in for the GPU, and the results say so")

    top = Parser(
        prog="python -m bench", description=__doc__, epilog=USAGE, formatter_class=raw, parents=[suite_of, on_a_gpu]
    )
    top.set_defaults(run=this_machine)
    commands = top.add_subparsers(metavar="COMMAND", parser_class=Parser)
    cpu = commands.add_parser("cpu", parents=[suite_of], help="time over eager PyTorch's, and memory, on this CPU")
    cpu.set_defaults(run=on_cpu)
    gpu = commands.add_parser("gpu", parents=[suite_of, on_a_gpu], help="shares of a copy's speed, memory, on a GPU")
    gpu.set_defaults(run=on_gpu)
    part = commands.add_parser("part", parents=[suite_of, on_a_gpu], add_help=False)  # of those two, in a process
    part.add_argument("number", type=int)
    part.add_argument("--of", type=int)
    part.set_defaults(run=a_part)

    comparison = commands.add_parser(
        "compare", parents=[what], help="is B slower than A, or takes it more memory? 1 if so", formatter_class=raw
    )
    comparison.add_argument("before", metavar="A", help="results.json; with --run a checkout's folder, or a commit")
    comparison.add_argument("after", metavar="B")
    comparison.add_argument("--run", action="store_true", dest="paired", help="measure the two now, in turns")
    comparison.add_argument(
        "--tolerance", type=positive(float), default=100 * TOLERANCE, help="per cent that do not matter"
    )
    comparison.add_argument("--anyway", action="store_true", help="though processor, threads or versions differ")
    comparison.add_argument("--full", action="store_true", help="list what did not change, too")
    comparison.set_defaults(run=compared)
    shown = commands.add_parser("show", help="table and pictures of results, again")
    shown.add_argument("file", type=Path, metavar="FILE.json")
    shown.set_defaults(run=lambda given: show(given.file))
    return top


def _list(values: Iterable[object]) -> str:
    return ",".join(map(str, values))


def among(what: str, known: Collection[str]) -> Callable[[str], list[str]]:
    """Names with commas between them, each a known one."""

    def chosen(text: str) -> list[str]:
        for name in text.split(","):
            if name not in known:
                raise BadInput(f"unknown {what} {name!r}; there are {', '.join(known)}")
        return text.split(",")

    return chosen


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError
        return value

    read.__name__ = f"positive {kind.__name__}"  # in argparse's message
    return read


def widths(text: str) -> list[float]:
    return [positive(int)(part) for part in text.split(",")]


def cases_of(given: argparse.Namespace, on_cpu: bool, words: str = "") -> list[Case]:
    """What was asked for, or the cases with these words; on a CPU, with fewer widths unless told."""
    words = words if given.only is None else given.only
    size = given.size or (1 / 64 if getattr(given, "rehearse", False) else 16 if on_cpu else 1024)
    cases = sweep(int(size * MIB), given.widths or (CPU_WIDTHS if on_cpu else WIDTHS), given.dtypes)
    found = [case for case in cases if {*words.split()} <= {*str(case).split()}]
    if not found:
        raise BadInput(f"no case has {words!r} in its name; one is {next(sweep(MIB))}")
    return found


def options_of(given: argparse.Namespace) -> list[str]:
    """For a process that does a part."""
    lists = {"contenders": given.contenders, "widths": given.widths, "dtypes": given.dtypes}
    values = {name: _list(value) for name, value in lists.items() if value}
    values |= {name: getattr(given, name) for name in ("only", "size", "seconds", "threads")}
    found = [f"--{name}={value}" for name, value in values.items() if value is not None]
    return found + (["--rehearse"] if getattr(given, "rehearse", False) else [])


def this_machine(given: argparse.Namespace) -> int:
    return on_gpu(given) if given.rehearse or here().device.type != "cpu" else on_cpu(given)


def on_cpu(given: argparse.Namespace) -> int:
    """Each run in a process of its own. One that was interrupted is gone on with."""
    machine = Cpu()
    folder = writable(given.out or RUNS / slug(machine.name))
    files = [folder / f"run-{i + 1}.json" for i in range(given.runs or 5)]
    cases_of(given, on_cpu=True, words=MEAN)
    for i, file in enumerate(files):
        print(f"run {i + 1} of {len(files)}: {file}")
        part = ["part", str(i), "--out", str(file), *options_of(given)]
        status = subprocess.run([sys.executable, "-m", "bench", *part], cwd=HERE.parent).returncode
        if status:
            return status
    found = results.merged([load(file) for file in files])
    found.environment["command"] = ["python", "-m", "bench", *sys.argv[1:]]
    results.save(found, folder / "results.json")
    for file in files:
        file.unlink()
    return finished(given, folder, machine)


def on_gpu(given: argparse.Namespace) -> int:
    from bench import gpu

    machine = gpu.machine_for(given)
    given.out = writable(given.out or RUNS / slug(machine.name))
    status = gpu.run(given, machine, cases_of(given, on_cpu=False), options_of(given))
    return finished(given, given.out, machine) or status


def finished(given: argparse.Namespace, folder: Path, machine: Machine) -> int:
    status = show(folder / "results.json")
    published = RESULTS / slug(machine.name)
    if given.publish:
        for file in sorted(file for pattern in PUBLISHED for file in folder.glob(pattern)):
            print(f"{'replaced' if (published / file.name).exists() else 'new'}: {published / file.name}")
            published.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, published / file.name)
    return status


def show(file: Path) -> int:
    """Table and pictures beside the results."""
    from bench.pictures import pictures
    from bench.table import table

    found = load(file)
    page = file.with_name("table.md")
    page.write_text(table(found))
    for path in (page, *pictures(found, file.parent)):
        print(f"wrote {path}")
    return 0


def a_part(given: argparse.Namespace) -> int:
    from bench import gpu

    if given.of:
        for taken in gpu.first_calls(given, cases_of(given, on_cpu=False)):
            print(gpu.MARK + json.dumps(taken))
        return 0
    settle(given.threads, given.number)
    machine = Cpu()
    found = suite.begin(machine, given.out, given.contenders or contenders.REGISTRY)
    if not given.number:
        suite.introduce(found)
    suite.run(cases_of(given, on_cpu=True, words=MEAN), machine, found, given.out, given.seconds or 0.3)
    return 0


def compared(given: argparse.Namespace) -> int:
    from bench.compare import check_comparable, compare, regressed, report
    from bench.paired import checkout, side_by_side

    if given.paired:
        with ExitStack() as stack:
            a, b = (checkout(text, stack) for text in (given.before, given.after))
            on_cpu = here().device.type == "cpu"
            if on_cpu:  # or it would take an hour
                given.size, given.widths = given.size or 4, given.widths or (10, 1000, 32000)
            cases = cases_of(given, on_cpu, MEAN)
            names = given.contenders or ["softxent"]
            before, after = side_by_side(a, b, cases, names, given.runs or 6, given.threads)
        for text, found in ((given.before, before), (given.after, after)):
            found.environment["commit"] = found.environment["commit"] or text
    else:
        before, after = load(Path(given.before)), load(Path(given.after))
        if not given.anyway:
            check_comparable(before, after)
    changes = compare(before, after, given.tolerance / 100, given.paired)
    print(report(changes, before, after, given.tolerance / 100, given.paired, given.full))
    return int(regressed(changes))


def writable(folder: Path) -> Path:
    if folder.resolve().is_relative_to(RESULTS):
        raise BadInput(f"{folder} is what git keeps; leave --out away and say --publish to write there")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".partial").touch()
        (folder / ".partial").unlink()
    except OSError as error:
        raise BadInput(f"{folder} cannot be written: {error.strerror}") from None
    return folder


def slug(name: str) -> str:
    """NVIDIA H200 -> nvidia-h200"""
    return "-".join(re.findall("[a-z0-9]+", name.lower()))
