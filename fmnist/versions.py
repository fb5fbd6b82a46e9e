"""What a run ran with: the date, the CPU, the versions of Python and of the libraries, the commit of this checkout."""

import platform
import re
import subprocess
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import softxent

ROOT = Path(__file__).parents[1]
LIBRARIES = ("triton", "numpy", "matplotlib")  # asked for without importing them; left out where not installed


def versions() -> dict[str, str]:
    """By name: what takes part in a run, and, where this is a git checkout, its commit."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "softxent": softxent.__version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            pass
    at = commit()
    return found | {"commit": at} if at else found


def circumstances() -> dict[str, Any]:
    """By name: the date, and the CPU with the instructions and the number of threads that torch uses of it."""
    return {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "cpu": cpu_model(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cpu_threads": torch.get_num_threads(),
    }


def cpu_model() -> str:
    """As the kernel names it, and where it does not, the architecture."""
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:  # not Linux
        found = None
    return found[1] if found else platform.processor() or platform.machine()


def line() -> str:
    """For --version."""
    found = versions()
    at = f", commit {found['commit'][:12]}" if "commit" in found else ""
    return f"softxent {found['softxent']}{at}; torch {found['torch']}, Python {found['python']}"


def commit(root: Path = ROOT) -> str | None:
    """The commit that is checked out at `root`, with "-dirty" behind it where files differ from it; else None.

    None also for a copy without git's folder that lies in the checkout of something else.
    """
    if not (root / ".git").exists():
        return None
    describe = "describe --always --dirty --abbrev=40 --exclude=*"
    command = ["git", "--no-optional-locks", "-C", str(root), *describe.split()]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):  # no git, or a disk that does not answer
        return None
    return result.stdout.strip() if result.returncode == 0 else None
