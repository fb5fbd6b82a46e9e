"""All cases, all contenders: correct first, then timed, correct again, and written down after each case."""

import hashlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch

import softxent
from bench import contenders, results
from bench.cases import Case, Inputs, inputs
from bench.contenders import Contender, Unavailable, Unsupported
from bench.correctness import check, in_words
from bench.machine import Machine
from bench.results import Measurement, Results
from bench.timing import Timed, contest, sets_of
from bench.work import Run, Work

CEILING_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}  # of the copy that is the machine's limit
ROOT = Path(__file__).parents[1]
SEED = 0
LOST = "the device was lost"
DOES_NOT = "does not do it"  # an option that a contender has not, which is no mistake
TIMED = 0.5  # of a case's share of the time that is left; the rest is for its inputs, and for being right


def begin(machine: Machine, path: Path | None, names: Iterable[str], say: Callable[[str], None]) -> Results:
    """Results to fill: those of an earlier run of the same code on the same device, or new ones."""
    device = machine.name
    now = environment(machine)
    found = Results(device, now, rehearsed=machine.rehearsed)
    if path is not None and path.exists():
        old = results.load(path)
        was = {key: old.environment.get(key) for key in ("sources", "torch", "triton")}
        if (old.device, was) == (device, {key: now[key] for key in was}):
            say(f"going on with {path}: {len(old.measurements)} figures are there")
            found = old
            found.environment["gone_on_with"] = [*found.environment.get("gone_on_with", []), now["before"]]
        else:
            say(f"{path} is of another device or code ({old.device}, {old.environment.get('commit')}): begun anew")
    for name in names:
        try:
            one = contenders.load(name, machine.device.type)
            overwrites = {"overwrites": "the logits"} if one.overwrites else {}
            found.contenders[name] = {"version": one.version} | overwrites
        except Unavailable as error:
            found.contenders[name] = {"unavailable": str(error)}
    for name, entry in found.contenders.items():
        say(f"{name:20s} {entry.get('version') or entry['unavailable']}")
    return found


def run(
    cases: Iterable[Case],
    machine: Machine,
    found: Results,
    path: Path | None,
    seconds: float,
    say: Callable[[str], None],
    deadline: float = float("inf"),
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
        say(LEGEND[found.on_cpu])
    expected = 0.0  # seconds of the next case: as the last, and one that took long is forgotten by and by
    for i, case in enumerate(remaining):
        start = time.monotonic()
        if start + expected > deadline:
            left = remaining[i:]
            break
        share = TIMED * (deadline - start) / (len(remaining) - i) / (2 if machine.graphs else 1)
        lost, todo = lost_at(case, found), unmeasured(case, available, found)
        found.measurements = [one for one in found.measurements if one.case != case]
        measured = list(lost.values())
        try:
            measured += measure(case, todo, machine, min(seconds, share))
        except Lost as error:
            found.measurements += [*measured, error.measurement]
            if path is not None:
                results.save(found, path)
            raise
        except Exception as error:  # nobody's in particular: no memory, say
            measured += [Measurement(case, name, error=in_words(error)) for name in todo]
        machine.free()
        if first is not None:
            for one in measured:
                one.first_seconds = first.get(f"{one.contender} at {case}")
        found.measurements += measured
        say(line(case, found))
        if path is not None:
            results.save(found, path)
        expected = max(time.monotonic() - start, expected / 2)
    if machine.graphs:
        measure_ceiling(machine, found)
        found.environment["under_load_after"] = loaded(machine)
    found.environment["after"] = machine.describe()
    if path is not None:
        results.save(found, path)
    return left


def lost_at(case: Case, found: Results) -> dict[str, Measurement]:
    """Who took the device along there: not asked again."""
    return {name: one for name, one in found.of(case).items() if (one.error or "").startswith(LOST)}


def unmeasured(case: Case, available: Mapping[str, Contender], found: Results) -> dict[str, Contender]:
    """Whom to measure there, in the same turns: everyone, if one of them has not been."""
    lost, done = lost_at(case, found), found.of(case)
    todo = {name: one for name, one in available.items() if one.op == case.op and name not in lost}
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
        return machine.seconds(partial(work.once, one))
    except Exception:
        return None


def measure(case: Case, todo: dict[str, Contender], machine: Machine, seconds: float) -> list[Measurement]:
    """One case. A contender that is wrong, before or after, has an error and no time."""
    measured = {name: Measurement(case, name) for name in todo}
    works: dict[str, Work] = {}
    sets = [inputs(case, machine.device, SEED + i) for i in range(sets_of(machine, case.matrix_bytes))]
    given = sets[0].logits.detach().clone()
    for name, contender in todo.items():
        try:
            works[name] = Work(contender, case)
            measured[name].first_seconds = machine.seconds(partial(works[name].once, sets[0]))
        except Unsupported as error:
            measured[name].error = f"{DOES_NOT}: {error}"
        except Exception as error:  # the contender's own
            measured[name].error = in_words(error)
        still_there(machine, case, name)
        with torch.no_grad():
            sets[0].logits.copy_(given)
    refuse(works, measured)

    def checked(seeds: list[int]) -> None:
        for name, errors in check(works, case, sets[0], seeds, partial(still_there, machine, case)).items():
            if isinstance(errors, str):
                measured[name].error = errors
            else:
                measured[name].errors = {k: max(v, measured[name].errors.get(k, 0.0)) for k, v in errors.items()}
        refuse(works, measured)

    checked([SEED + 1000, SEED + 1001])
    timed: dict[str, Timed] = {}
    if works:
        other = torch.empty_like(given)

        def copy() -> None:
            for one in sets:
                other.copy_(one.logits.detach())

        timed = contest(works, sets, machine, seconds, copy)
        for name, work in works.items():
            measured[name].peak_bytes = peak_bytes(work, sets[0], machine)
        checked([SEED + 2000])
    for name in works:
        measured[name].seconds, measured[name].not_captured = timed[name].seconds, timed[name].not_captured
    if "copy" in timed:
        measured["copy"] = Measurement(case, "copy", seconds=timed["copy"].seconds)
    return list(measured.values())


def refuse(works: dict[str, Work], measured: dict[str, Measurement]) -> None:
    """No further work for those with an error."""
    for name in [name for name in works if measured[name].error]:
        del works[name]


def peak_bytes(work: Work, one: Inputs, machine: Machine) -> int:
    state = work.prepare(one)
    return machine.peak_bytes(partial(work.run, state))


def measure_ceiling(machine: Machine, found: Results) -> None:
    """Bytes a second of a large copy (read and written), of reading, and of writing, at the start and at the end.

    The better one is kept. Of random numbers: some memories move zeros faster.
    """
    copy, source, target = large_copy(machine)
    size = source.nbytes
    write = partial(target.fill_, 1.0)
    runs: dict[str, tuple[int, Run]] = {"copy": (2, copy), "read": (1, source.sum), "write": (1, write)}
    for name, (passes, run) in runs.items():
        run()
        times = sorted(machine.seconds(run) for _ in range(20))
        found.ceilings[name] = max(found.ceilings.get(name, 0.0), passes * size / times[len(times) // 2])


def large_copy(machine: Machine) -> tuple[Run, torch.Tensor, torch.Tensor]:
    size = min(CEILING_BYTES[machine.device.type], machine.memory_bytes // 8)
    source = torch.randn(size // 4, device=machine.device)
    target = torch.empty_like(source)
    return partial(target.copy_, source), source, target


def loaded(machine: Machine) -> dict[str, object]:
    """The device, described while it copies: clocks of an idle one say nothing."""
    copy, *_ = large_copy(machine)
    for _ in range(2000 if machine.device.type == "cuda" else 0):
        copy()
    described = machine.describe()
    machine.synchronize()
    return described


LEGEND = {
    True: "Each figure: time over eager PyTorch's in the same turns (quartiles of the turns). Lower is better. The "
    "limit is the time in which a copy of the logits moves the least bytes of the case.",
    False: "Each figure: the least bytes of the case over the time, as a share of a large copy's GB/s (quartiles of "
    "the turns). Higher is better, and 100 % the limit of what reads as much as it writes.",
}


def line(case: Case, found: Results) -> str:
    """A case in a line, as it is done: figures with their unit, their noise and their limit."""
    cells = []
    for name, one in found.of(case).items():
        figure, share = found.figure(one), found.share_of_copy(one)
        if one.error:
            cells.append(f"{name}: {one.error}")
        elif name == "copy" or figure is None or (not found.on_cpu and share is None):
            continue
        elif figure.noisy:
            cells.append(f"{name} noisy")
        elif found.on_cpu:
            cells.append(f"{name} {figure.middle:.2f} x ({figure.low:.2f}-{figure.high:.2f})")
        else:
            low, high = (100 * (share or 0) * figure.middle / end for end in (figure.high, figure.low))
            cells.append(f"{name} {100 * (share or 0):.0f} % ({low:.0f}-{high:.0f})")
    if found.on_cpu and (limit := found.limit(case)):
        cells.append(f"limit {limit:.2f} x")
    return f"{case}: {', '.join(cells)}"


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
