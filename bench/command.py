"""Is the fused softmax and cross-entropy right, how fast is it, and how much memory does it take? Beside PyTorch, and
beside the other libraries that are installed. Each contender's loss and gradient are held against float64 first; who is
wrong gets no time. Then all take turns, in several processes; a figure is shown with its noise, or called noisy, and
beside it is the limit: what a copy of the logits takes. Exit status: 0, or 1 regressed, 2 unusable input, 3 time is up.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
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
  python -m bench                          this machine: its GPU if there is one, else its CPU
  python -m bench cpu --publish            and put the results where git sees them
  python -m bench gpu --minutes 9          a GPU; the same command goes on where it was cut off
  python -m bench compare --run main .     is this checkout slower than that commit, or takes it more memory?
  python -m bench compare A.json B.json    the same of two results
"""
HERE = Path(__file__).parent
RESULTS, RUNS = HERE / "results", HERE / "runs"  # what git keeps, and what it ignores
PUBLISHED = ("*.png", "table.md", "results.json")
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
    what.add_argument("--contenders", type=names, help=f"of {', '.join(contenders.REGISTRY)}; all that are here")
    what.add_argument("--widths", type=widths, help=f"columns; {_list(CPU_WIDTHS)} on a CPU, {_list(WIDTHS)} on a GPU")
    what.add_argument("--dtypes", type=dtypes, default=DTYPES, help="bfloat16,float32")
    what.add_argument("--size", type=positive, help="of the logits, in MiB; 16 on a CPU, 1024 on a GPU")
    what.add_argument("--runs", type=count, help="processes: noise is what differs between them; 5, of compare 10")
    what.add_argument("--threads", type=count, default=1, help="of a CPU; 1, by CPU time, on one core; else wall time")
    suite_of = Parser(add_help=False, parents=[what])
    suite_of.add_argument("--seconds", type=positive, help="of timing a case in each run; 0.3 on a CPU, 0.2 on a GPU")
    suite_of.add_argument("--out", type=Path, help="folder of the results; bench/runs/MACHINE, which git ignores")
    suite_of.add_argument("--publish", action="store_true", help="copy them to bench/results/MACHINE, which git keeps")
    on_a_gpu = Parser(add_help=False)
    on_a_gpu.add_argument("--minutes", type=positive, default=9.0, help="it ends within; 9")
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
    comparison.add_argument("--out", type=Path, help="of --run: folder for A.json and B.json")
    comparison.add_argument("--tolerance", type=positive, help=f"per cent that do not matter; {100 * TOLERANCE:g}")
    comparison.add_argument("--anyway", action="store_true", help="though processor, threads or versions differ")
    comparison.add_argument("--all", action="store_true", help="every contender decides, not softxent's alone")
    comparison.add_argument("--missing-ok", action="store_true", help="cases that B has not are no regression")
    comparison.add_argument("--full", action="store_true", help="list what did not change, too")
    comparison.set_defaults(run=compared)
    shown = commands.add_parser("show", help="table and pictures of results, again")
    shown.add_argument("file", type=Path, metavar="FILE.json")
    shown.set_defaults(run=lambda given: show_in(given.file.parent, given.file))
    commands.add_parser("list", help="who is compared, and who is not here").set_defaults(run=listed)
    return top


def _list(numbers: Iterable[int]) -> str:
    return ",".join(map(str, numbers))


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


def count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise BadInput(f"{text!r} is not a number from 1 on")
    return int(text)


def say(text: str) -> None:
    print(text, flush=True)


def cases_of(given: argparse.Namespace, on_cpu: bool) -> list[Case]:
    """What was asked for; on a CPU, with fewer widths and fewer kinds unless told."""
    rehearsed = getattr(given, "rehearse", False)
    size = given.size or (1 / 64 if rehearsed else 16 if on_cpu else 1024)
    found = list(sweep(int(size * MIB), given.widths or (CPU_WIDTHS if on_cpu else WIDTHS), given.dtypes))
    if given.contenders:
        wanted = {"softmax" if name in contenders.SOFTMAX else "cross_entropy" for name in given.contenders}
        found = [case for case in found if case.op in wanted]
    return found


def options_of(given: argparse.Namespace) -> list[str]:
    """For a process that does a part."""
    listed = {"contenders": given.contenders, "widths": given.widths, "dtypes": given.dtypes}
    found = [f"--{name}={','.join(map(str, value))}" for name, value in listed.items() if value]
    found += [f"--{name}={value}" for name in ("size", "seconds", "threads") if (value := getattr(given, name))]
    return found + (["--rehearse"] if getattr(given, "rehearse", False) else [])


def this_machine(given: argparse.Namespace) -> int:
    return on_gpu(given) if given.rehearse or here().device.type != "cpu" else on_cpu(given)


def on_cpu(given: argparse.Namespace) -> int:
    """Each run in a process of its own. One that was interrupted is gone on with."""
    machine = Cpu()
    folder = writable(given.out or RUNS / slug(machine.name))
    files = [folder / f"run-{i + 1}.json" for i in range(given.runs or 5)]
    for i, file in enumerate(files):
        say(f"run {i + 1} of {len(files)}: {file}")
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


def finished(given: argparse.Namespace, folder: Path, machine: Machine) -> int:
    status = show_in(folder)
    published = RESULTS / slug(machine.name)
    if given.publish:
        for file in sorted(file for pattern in PUBLISHED for file in folder.glob(pattern)):
            say(f"{'replaced' if (published / file.name).exists() else 'new'}: {published / file.name}")
            published.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, published / file.name)
    return status


def on_gpu(given: argparse.Namespace) -> int:
    from bench import gpu

    machine = gpu.machine_for(given)
    given.out = writable(given.out or RUNS / slug(machine.name))
    status = gpu.run(given, machine, cases_of(given, on_cpu=False), options_of(given), say)
    return finished(given, given.out, machine) or status


def a_part(given: argparse.Namespace) -> int:
    from bench import gpu

    if given.of:
        for taken in gpu.first_calls(given, cases_of(given, on_cpu=False)):
            say(gpu.MARK + json.dumps(taken))
        return 0
    settle(given.threads, given.number)
    machine = Cpu()
    quiet = (lambda _: None) if given.number else say
    found = suite.begin(machine, given.out, given.contenders or list(contenders.REGISTRY), quiet)
    suite.run(cases_of(given, on_cpu=True), machine, found, given.out, given.seconds or 0.3, say)
    return 0


def compared(given: argparse.Namespace) -> int:
    from bench.compare import check_comparable, compare, regressed, report
    from bench.paired import checkout, side_by_side

    tolerance = TOLERANCE if given.tolerance is None else given.tolerance / 100
    if given.paired:
        with ExitStack() as stack:
            a, b = (checkout(text, stack) for text in (given.before, given.after))
            on_cpu = here().device.type == "cpu"
            if on_cpu:  # or it would take an hour
                given.size, given.widths = given.size or 4, given.widths or (10, 1000, 32000)
            own = given.contenders or ["softxent"]
            cases = [one for one in cases_of(given, on_cpu) if one.kind == "mean" and one.mode != "backward"]
            before, after = side_by_side(a, b, cases, own, given.runs or 10, given.threads, say)
        for text, found in ((given.before, before), (given.after, after)):
            found.environment["commit"] = found.environment["commit"] or text
        if given.out:
            results.save(before, given.out / "A.json")
            results.save(after, given.out / "B.json")
    else:
        before, after = load(Path(given.before)), load(Path(given.after))
        if not given.anyway:
            check_comparable(before, after)
    changes = compare(before, after, tolerance, given.paired)
    say(report(changes, before, after, tolerance, given.paired, given.full))
    return int(regressed(changes, given.all, given.missing_ok))


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
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
