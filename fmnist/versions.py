"""What a run ran with: the versions of Python and of the libraries, and the commit of this checkout."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

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
