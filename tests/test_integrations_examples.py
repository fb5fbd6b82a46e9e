"""examples/: each runs, alone, where its library is installed, and learns: `make integrations`."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "accelerate": ["accelerate"],
    "lightning": ["lightning"],
    "timm": ["timm", "torchvision"],
    "trl": ["trl", "datasets"],
}


@pytest.mark.parametrize("library", list(EXAMPLES))
def test_the_example_learns(library: str, tmp_path: Path) -> None:
    if missing := [name for name in EXAMPLES[library] if find_spec(name) is None]:
        pytest.skip(f"{' and '.join(missing)} not installed: make integrations")
    environment = os.environ | {"PYTHONPATH": str(ROOT / "kernels"), "TRITON_INTERPRET": "0"}
    command = [sys.executable, str(ROOT / "examples" / f"train_with_{library}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    first, last = float(words[-3]), float(words[-1])
    assert words[-5:-3] == ["loss", "from"] and 0 < last < 0.7 * first


def test_every_example_is_run() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {f"train_with_{name}" for name in EXAMPLES}
