"""What a wheel holds and asks for, that it runs with torch alone, and that the folder `kernels` stays harmless."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.message import Message
from email.parser import Parser
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parent.parent
PACKAGES = {"softxent", "softxent.cpu", "softxent.integrations", "softxent.parallel", "softxent.triton_kernels"}

# As a user without them: torch works without numpy, and softxent without Triton.
WITHOUT = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, WHEEL)
import torch
import softxent
assert softxent.__file__.startswith(WHEEL), softxent.__file__
z, y = torch.randn(8, 5, requires_grad=True), torch.randint(5, (8,))
found = softxent.fused_softmax_xent_with_stats(
    z * 1, y, torch.rand(5) + 1, label_smoothing=0.1, z_loss=0.1, softcap=3.0, logit_scale=0.5, normalizer=2.0
)
(found.loss + found.entropy.sum() + found.target_logprob.sum() + found.lse.sum()).backward()
softxent.fused_softmax_xent(z * 1, torch.rand(8, 5), inplace=True).backward()
softxent.FusedSoftmaxXent(reduction="sum")(z, y).backward()
softxent.softmax(z).sum().backward()
torch.testing.assert_close(softxent.fused_softmax_xent(z, y), torch.nn.functional.cross_entropy(z, y))
print("ran", sorted({name.split(".")[0] for name in sys.modules} & {"triton", "numpy"}))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution, built from a copy: setuptools leaves its own files there."""
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for folder in ("kernels", "tests"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    pytest.importorskip("build")
    command = [sys.executable, "-m", "build", "--no-isolation", "-o", str(dist), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return dist


def metadata(built: Path) -> Message:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(wheel.read(name).decode())


def test_the_wheel_is_the_package_and_the_source_distribution_has_no_tests(built: Path) -> None:
    files = {str(path.relative_to(ROOT / "kernels")) for path in (ROOT / "kernels/softxent").rglob("*.py")}
    files.add("softxent/py.typed")
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        assert {name for name in wheel.namelist() if ".dist-info/" not in name} == files
        assert any(name.endswith("/licenses/LICENSE") for name in wheel.namelist())
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert {f"kernels/{name}" for name in files} | {"LICENSE", "README.md", "CHANGELOG.md", "setup.py"} <= names
    assert not any(name.startswith("tests") for name in names)


def test_it_asks_for_torch_alone_and_says_what_it_is(built: Path) -> None:
    found = metadata(built)
    asked = found.get_all("Requires-Dist") or []
    assert [name for name in asked if "extra ==" not in name] == ["torch>=2.10"]
    assert {re.split(r"[>=;]", name)[0].strip() for name in asked if 'extra == "triton"' in name} == {"triton"}
    assert found["License-Expression"] == "MIT" and found["License"] is None
    assert found["Keywords"] and len(found.get_all("Classifier") or []) > 5
    assert "Author" not in found and "Project-URL" not in found  # there is none to name


def test_an_index_shows_no_link_into_the_checkout(built: Path) -> None:
    page = metadata(built).get_payload()
    assert isinstance(page, str) and "fused_softmax_xent(logits, target, label_smoothing=0.1)" in page
    assert re.findall(r"\]\((?!https?://)[^)]*\)", page) == []


def test_the_wheel_runs_without_triton_and_numpy(built: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    program = WITHOUT.replace("WHEEL", repr(str(tmp_path)))
    env = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path, env=env)
    assert done.returncode == 0 and done.stdout == "ran []\n", done.stdout + done.stderr


def test_kernels_is_a_source_root_and_no_package() -> None:
    """An importable package of that name would hide Hugging Face's `kernels`, which transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert sorted(path.name for path in (ROOT / "kernels").iterdir() if path.suffix != ".egg-info") == ["softxent"]


def test_only_softxent_is_shipped() -> None:
    assert set(find_packages(str(ROOT / "kernels"))) == PACKAGES


def test_the_package_imports_only_itself_torch_and_triton() -> None:
    allowed = {"torch", "triton", "softxent"} | sys.stdlib_module_names
    for path in (ROOT / "kernels").rglob("*.py"):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")) and not line.startswith("from ."):
                assert line.split()[1].split(".")[0] in allowed, f"{path}: {line}"
