"""The machine that is measured: all that the suite asks of a device, so that it can be rehearsed where there is none.

Cpu         a CPU's clock; no graphs. Of one thread, the CPU time that it was given: on a shared machine, what the
            neighbours took is not in it
Cuda        a GPU's: events, CUDA graphs, its memory and clocks
Rehearsal   a CPU that answers every call a GPU would, with what it has; its results say so
"""

import os
import platform
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.work import Run

AHEAD = 100_000  # clock cycles for which the device waits while the host launches what is timed


class CannotCapture(Exception):
    """A run that cannot become a graph, as one that waits for the device; with the reason."""


class Cpu:
    graphs = False  # whether `capture` makes what a GPU would run without its host
    rehearsed = False

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.name = f"CPU {cpu_model()} {torch.backends.cpu.get_cpu_capability()}"
        self.l2_bytes = 0
        self.memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

    def describe(self) -> dict[str, Any]:
        """Hardware, driver and clocks, as they are now."""
        return {
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "clock": "CPU time" if clock() is time.process_time else "wall time",
        }

    def synchronize(self) -> None:
        pass

    def seconds(self, run: Run) -> float:
        """Of one call, by the device's clock; the host's part too, where the device waits for it."""
        now = clock()
        start = now()
        run()
        return now() - start

    def capture(self, run: Run) -> Run:
        """A call that does the same work without the host. Raises CannotCapture."""
        raise CannotCapture("there are no graphs on a CPU")

    def peak_bytes(self, run: Run) -> int:
        """The most that a call had asked for at once, beyond what was there before, its result included."""
        from torch.autograd.profiler import profile  # torch.profiler's would import Inductor, in seconds

        with profile(profile_memory=True) as profiled:
            result = run()
        del result
        kineto = profiled.kineto_results
        now = most = 0
        for event in sorted((e for e in kineto.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most

    def free(self) -> None:
        """Gives back memory that is only kept for later."""


def clock() -> Callable[[], float]:
    """CPU time counts all threads: of several, only the clock on the wall says how long they took."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def settle(threads: int, run: int) -> None:
    """This process for one run: so many threads; a single one stays on one core, another core each run.

    Cores differ while their neighbours are busy, by a third on the machine where this was tried.
    """
    torch.set_num_threads(threads)
    if threads == 1 and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[run % len(cores)]})


class Rehearsal(Cpu):
    graphs = True
    rehearsed = True

    def __init__(self) -> None:
        super().__init__()
        self.name = "rehearsal"
        self.l2_bytes = 1 << 16

    def capture(self, run: Run) -> Run:
        run()
        return run


class Cuda:
    graphs = True
    rehearsed = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self.device)
        self.name = properties.name
        self.l2_bytes = properties.L2_cache_size
        self.memory_bytes = properties.total_memory

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
            "memory_gb_per_s": theoretical_gb_per_s(properties),
            "capability": f"{properties.major}.{properties.minor}",
            "cpu": cpu_model(),
            "cuda": torch.version.cuda or torch.version.hip,
            **nvidia_smi(),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, run: Run) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(AHEAD)  # or the launch would be in the time of what is launched
        start.record()
        run()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3

    def capture(self, run: Run) -> Run:
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.device)
        try:
            with torch.cuda.stream(stream):
                run()  # whatever is compiled or allocated once
                # Who waits for the device is found before the capture: one that fails leaves torch 2.11's allocator in
                # the middle of it (mended by pytorch #180395).
                torch.cuda.set_sync_debug_mode("error")
                try:
                    run()
                finally:
                    torch.cuda.set_sync_debug_mode("default")
            torch.cuda.synchronize(self.device)
            with torch.cuda.graph(graph, stream=stream):
                run()
            torch.cuda.synchronize(self.device)
        except Exception as error:
            torch.cuda.set_stream(current)
            torch.cuda.synchronize(self.device)
            raise CannotCapture(f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"[:200]) from error
        return graph.replay

    def peak_bytes(self, run: Run) -> int:
        # "requested": what is "allocated" depends, by up to 1 MiB a tensor, on what the allocator has lying about.
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_stats(self.device)["requested_bytes.all.current"]
        result = run()
        self.synchronize()
        del result
        return int(torch.cuda.memory_stats(self.device)["requested_bytes.all.peak"] - before)

    def free(self) -> None:
        self.synchronize()
        torch.cuda.empty_cache()


def theoretical_gb_per_s(properties: Any) -> int | str:
    """Of the memory: its clock (kHz) x its width (bits) x 2, as data moves at both edges."""
    clock, width = (getattr(properties, name, None) for name in ("memory_clock_rate", "memory_bus_width"))
    return round(2 * clock * 1e3 * width / 8 / 1e9) if clock and width else "unknown"


Machine = Cpu | Cuda


def here() -> Machine:
    """The GPU, if there is one."""
    return Cuda() if torch.cuda.is_available() else Cpu()


def cpu_model() -> str:
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return " ".join(re.sub(r"\((R|TM)\)|\bCPU\b|@.*", " ", name).split())


CLOCKS = {
    "driver": "driver_version",
    "clock_mhz": "clocks.sm",
    "clock_limit_mhz": "clocks.max.sm",
    "memory_clock_mhz": "clocks.mem",
    "memory_clock_limit_mhz": "clocks.max.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
    "throttled": "clocks_event_reasons.active",
}


def nvidia_smi() -> dict[str, str]:
    """Driver, clocks, power and temperature as nvidia-smi reads them; nothing where there is none."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CLOCKS.values())}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    line = done.stdout.splitlines()[torch.cuda.current_device()]
    return dict(zip(CLOCKS, (value.strip() for value in line.split(",")), strict=True))
