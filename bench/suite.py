"""All cases, all contenders: correct first, then timed, correct again, and written down after each case."""

import hashlib
import math
import platform
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import median

import torch

import softxent
from bench import contenders, results
from bench.cases import Case, inputs
from bench.contenders import Contender, Unavailable, Unsupported
from bench.correctness import check, in_words
from bench.machine import Machine
from bench.results import Measurement, Results
from bench.timing import contest, sets_of
from bench.work import Run, Work

CEILING_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # of the copy that is the machine's limit
ROOT = Path(__file__).parents[1]
SEED = 0
LOST = "the device was lost"
DOES_NOT = "does not do it"  # an option that a contender has not, which is no mistake
TIMED = 0.5  # of a case's share of the time that is left; the rest is for its inputs, and for being right


def begin(machine: Machine, path: Path | None, names: Iterable[str]) -> Results:
    """Results to fill: those of an earlier run of the same code on the same device, or new ones."""
    device = machine.name
    now = environment(machine)
    found = Results(device, now, rehearsed=machine.rehearsed)
    if path is not None and path.exists():
        old = results.load(path)
        was = {key: old.environment.get(key) for key in ("sources", "torch", "triton")}
        if (old.device, was) == (device, {key: now[key] for key in was}):
            print(f"going on with {path}: {len(old.measurements)} figures are there")
            found = old
        else:
            print(f"{path} is of another device or code ({old.device}, {old.environment.get('commit')}): begun anew")
    for name in names:
        try:
            one = contenders.load(name, machine.device.type)
            overwrites = {"overwrites": "the logits"} if one.overwrites else {}
            found.contenders[name] = {"version": one.version} | overwrites
        except Unavailable as error:
            found.contenders[name] = {"unavailable": str(error)}
    return found


def introduce(found: Results) -> None:
    for name, entry in found.contenders.items():
        print(f"{name:20s} {entry.get('version') or entry['unavailable']}")


def run(
    cases: Iterable[Case],
    machine: Machine,
    found: Results,
    path: Path | None,
    seconds: float,
    deadline: float = math.inf,
    first: Mapping[str, float] | None = None,
) -> list[Case]:
    """Fills `found`, and the file at `path`, case by case. The cases that were left when the time was up.

    Each method of a case is timed for so many `seconds`, or for less, so that the cases that are left can all be done
    before the deadline; none is begun that would probably not end before it.
    `first`: seconds of first calls that were made before, in processes of their own, by case and contender. Raises
    Lost where the device no longer answers; what was measured is in the file, with who was at work then.
    """
    available = load_all(found, machine)
    if machine.graphs:  # on a CPU there are ratios alone
        measure_ceiling(machine, found)
        if "under_load" not in found.environment:
            found.environment["under_load"] = loaded(machine)
    remaining = [case for case in cases if unmeasured(case, available, found)]
    left: list[Case] = []
    if remaining:
        print(LEGEND[found.on_cpu])
    expected = 0.0  # seconds of the next case: as the last, and one that took long is forgotten by and by
    for i, case in enumerate(remaining):
        start = time.monotonic()
        if start + expected > deadline:
            left = remaining[i:]
            break
        share = TIMED * (deadline - start) / (len(remaining) - i) / (2 if machine.graphs else 1)
        try:
            one_case(case, available, machine, found, min(seconds, share), first or {})
        finally:
            keep(found, path)
        print(line(case, found))
        expected = max(time.monotonic() - start, expected / 2)
    if machine.graphs:
        measure_ceiling(machine, found)
        found.environment["under_load_after"] = loaded(machine)
    found.environment["after"] = machine.describe()
    keep(found, path)
    return left


def keep(found: Results, path: Path | None) -> None:
    if path is not None:
        results.save(found, path)


def one_case(
    case: Case,
    available: Mapping[str, Contender],
    machine: Machine,
    found: Results,
    seconds: float,
    first: Mapping[str, float],
) -> None:
    """Measures it in the place of what `found` has of it. Raises Lost."""
    lost, todo = lost_at(case, found), unmeasured(case, available, found)
    measured = list(lost.values())
    try:
        measured += measure(case, todo, machine, seconds)
    except Lost as error:
        measured.append(error.measurement)
        raise
    except Exception as error:  # nobody's in particular: no memory, say
        measured += [Measurement(case, name, error=in_words(error)) for name in todo]
    finally:
        for one in measured:
            one.first_seconds = first.get(f"{one.contender} at {case}")
        found.measurements = [one for one in found.measurements if one.case != case] + measured
    machine.free()


def lost_at(case: Case, found: Results) -> dict[str, Measurement]:
    """Who took the device along there: not asked again."""
    return {name: one for name, one in found.of(case).items() if (one.error or "").startswith(LOST)}


def unmeasured(case: Case, available: Mapping[str, Contender], found: Results) -> dict[str, Contender]:
    """Whom to measure there, in the same turns: everyone, if one of them has not been."""
    lost, done = lost_at(case, found), found.of(case)
    todo = {name: one for name, one in available.items() if name not in lost}
    return {} if all(name in done for name in todo) else todo


class Lost(Exception):
    """The device no longer answers: this process can only end. `measurement` has who was at work."""

    def __init__(self, measurement: Measurement) -> None:
        super().__init__(f"{measurement.contender} at {measurement.case}: {measurement.error}")
        self.measurement = measurement


def still_there(machine: Machine, case: Case, name: str) -> None:
    """Raises Lost where an error has taken the device along."""
    try:
        machine.synchronize()
    except Exception as error:
        raise Lost(Measurement(case, name, error=f"{LOST}: {in_words(error)}")) from error


def load_all(found: Results, machine: Machine) -> dict[str, Contender]:
    names = [name for name, entry in found.contenders.items() if "version" in entry]
    return {name: contenders.load(name, machine.device.type) for name in names}


def first_call(case: Case, contender: Contender, machine: Machine) -> float | None:
    """Seconds; None if it fails, which the suite finds again and says."""
    try:
        work = Work(contender, case)
        one = inputs(case, machine.device, SEED)
        return machine.seconds(partial(work.run, one))
    except Exception:
        return None


def measure(case: Case, todo: dict[str, Contender], machine: Machine, seconds: float) -> list[Measurement]:
    """One case. A contender that is wrong, before or after, has an error and no time."""
    measured = {name: Measurement(case, name) for name in todo}
    works: dict[str, Work] = {}
    for name, contender in todo.items():
        try:
            works[name] = Work(contender, case)
        except Unsupported as error:
            measured[name].error = f"{DOES_NOT}: {error}"
    sets = [inputs(case, machine.device, SEED + i) for i in range(sets_of(machine, case.matrix_bytes))]

    def checked(seeds: list[int]) -> None:
        for name, errors in check(works, case, sets[0], seeds, partial(still_there, machine, case)).items():
            one = measured[name]
            if isinstance(errors, str):
                del works[name]
                measured[name] = Measurement(case, name, error=errors)
            else:
                one.errors = {key: max(value, one.errors.get(key, 0.0)) for key, value in errors.items()}

    checked([SEED + 1000, SEED + 1001])
    if works:
        other = torch.empty_like(sets[0].logits)

        def copy() -> None:
            for one in sets:
                other.copy_(one.logits.detach())

        for name, timed in contest(works, sets, machine, seconds, copy).items():
            one = measured.setdefault(name, Measurement(case, name))
            one.seconds, one.not_captured = timed.seconds, timed.not_captured
        for name, work in works.items():
            measured[name].peak_bytes = machine.peak_bytes(partial(work.run, sets[0]))
        checked([SEED + 2000])
    return list(measured.values())


def measure_ceiling(machine: Machine, found: Results) -> None:
    """Bytes a second that a large copy reads and writes, at the start and at the end; the better one is kept."""
    copy, n_bytes = large_copy(machine)
    copy()
    taken = median(machine.seconds(copy) for _ in range(20))
    found.ceilings["copy"] = max(found.ceilings.get("copy", 0.0), n_bytes / taken)


def large_copy(machine: Machine) -> tuple[Run, int]:
    """A copy, and the bytes that it reads and writes. Of random numbers: some memories move zeros faster."""
    size = min(CEILING_BYTES[machine.device.type], machine.memory_bytes // 8)
    source = torch.randn(size // 4, device=machine.device)
    return partial(torch.empty_like(source).copy_, source), 2 * source.nbytes


def loaded(machine: Machine) -> dict[str, object]:
    """The device, described while it copies: clocks of an idle one say nothing."""
    copy, _ = large_copy(machine)
    for _ in range(2000 if machine.device.type == "cuda" else 0):
        copy()
    described = machine.describe()
    machine.synchronize()
    return described


LEGEND = {
    True: "Each figure: time over eager PyTorch's in the same turns (quartiles of the turns). Lower is better. The "
    "limit is the time in which a copy of the logits moves the least bytes of the case.",
    False: "Each figure: the least bytes of the case over the time, in % of a large copy's GB/s (quartiles of the "
    "turns). Higher is better, and 100 % the limit of what reads as much as it writes.",
}


def line(case: Case, found: Results) -> str:
    """A case in a line, as it is done: figures with their unit, their noise and their limit."""
    unit, digits = ("x", 2) if found.on_cpu else ("%", 0)
    cells = []
    for name, one in found.of(case).items():
        figure = found.figure(one)
        if one.error and not one.error.startswith(DOES_NOT):
            cells.append(f"{name}: {one.error}")
        elif figure and name != "copy" and figure.noisy:
            cells.append(f"{name} noisy")
        elif figure and name != "copy":
            low, middle, high = (f"{value:.{digits}f}" for value in figure)
            cells.append(f"{name} {middle} {unit} ({low}-{high})")
    limit = found.limit(case)
    return f"{case}: {', '.join(cells)}" + (f", limit {limit:.{digits}f} {unit}" if limit else "")


def environment(machine: Machine, checkout: Path = ROOT) -> dict[str, object]:
    """Of a run with the package of that checkout."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    return {
        "softxent": softxent.__version__,
        "commit": commit(checkout),
        "sources": sources(checkout),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "system": f"{platform.system()} {platform.machine()}",
        "command": ["python", "-m", "bench", *sys.argv[1:]],
        "seed": SEED,
        "before": machine.describe(),
    }


def sources(checkout: Path) -> str:
    """A hash of the code that is measured, and of that which measures: results of other code are not gone on with."""
    found = hashlib.sha256()
    for folder in (checkout / "kernels", ROOT / "bench", ROOT / "tests"):
        for path in sorted(folder.rglob("*.py")):
            found.update(f"{path.relative_to(folder.parent)} ".encode() + path.read_bytes())
    return found.hexdigest()[:16]


def commit(checkout: Path) -> str | None:
    """With "+" where files have been changed since."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=10", "--exclude=*"],
            cwd=checkout, capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git, or no repository
        return None
    return found.stdout.strip()
