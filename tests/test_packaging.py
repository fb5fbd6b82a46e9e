"""What a wheel would hold, and that the folder `kernels` stays harmless."""

import sys
from pathlib import Path

from setuptools import find_packages

ROOT = Path(__file__).parent.parent


def test_kernels_is_a_source_root_and_no_package() -> None:
    """An importable package of that name would hide Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert sorted(path.name for path in (ROOT / "kernels").iterdir() if path.suffix != ".egg-info") == ["softxent"]


def test_only_softxent_is_shipped() -> None:
    assert set(find_packages(str(ROOT / "kernels"))) == {"softxent", "softxent.cpu", "softxent.triton_kernels"}


def test_the_package_imports_only_itself_torch_and_triton() -> None:
    allowed = {"torch", "triton", "softxent"} | sys.stdlib_module_names
    for path in (ROOT / "kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")) and not line.startswith("from ."):
                assert line.split()[1].split(".")[0] in allowed, f"{path}: {line}"
