"""The two ways through the package, as the fixture `path`: torch operations, and the kernels.

Without a GPU the kernels run in Triton's interpreter. `pytest --device cuda` runs them on the GPU, and nothing else
but tests marked `gpu`.
"""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: their threads would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import pytest
import torch

PATHS = ("torch", "kernels")
HYPOTHESIS = find_spec("hypothesis") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the kernels run")
    parser.addoption("--only", choices=PATHS, help="of the tests that go both ways through the package, those of one")
    parser.addoption("--shard", metavar="I/N", help="every N-th test, from the I-th: several processes share the work")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu" and find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        import interpreter

        interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Each of these takes up to a minute: started last, it would leave the other workers idle.
    long = "tests/test_compiles.py", "tests/test_emulated.py", "tests/test_around.py", "tests/test_bench_"
    items.sort(key=lambda item: not item.nodeid.startswith(long))
    on_gpu, only = config.getoption("--device") == "cuda", config.getoption("--only")
    kept = [item for item in items if (_goes_there(item) if on_gpu else _goes_here(item, only))]
    config.hook.pytest_deselected(items=list(set(items).difference(kept)))
    items[:] = kept
    if shard := config.getoption("--shard"):
        i, of = map(int, shard.split("/"))
        config.hook.pytest_deselected(items=[item for n, item in enumerate(items) if n % of != i])
        items[:] = items[i::of]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """On the GPU only files that run kernels there: others may need what is not installed beside it."""
    if config.getoption("--device") == "cpu" or collection_path.suffix != ".py":
        return None
    text = collection_path.read_text()
    return "device: torch.device" not in text or ("from hypothesis" in text and not HYPOTHESIS) or None


def pytest_report_header(config: pytest.Config) -> str | None:
    return None if HYPOTHESIS else "hypothesis is not installed: on a GPU test_properties.py is left out"


def _goes_there(item: Any) -> bool:
    """Without the device a test would make its tensors on the CPU, where the kernels do not run beside a GPU."""
    return item.get_closest_marker("gpu") or ("device" in item.fixturenames and _goes(item, "kernels"))


def _goes_here(item: Any, only: str | None) -> bool:
    marker = item.get_closest_marker("gpu")
    return not (marker and marker.kwargs.get("alone")) and (only is None or _goes(item, only))


def _goes(item: Any, path: str) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("path") == path


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    from softxent import dispatch

    name: str = request.param
    if name == "kernels" and find_spec("triton") is None:
        pytest.skip("Triton is not installed (it has no build for this platform): the kernels cannot run here")
    interpreted = name == "kernels" and request.config.getoption("--device") == "cpu"
    monkeypatch.setattr(dispatch, "INTERPRET", interpreted)
    return name


@pytest.fixture
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.config.getoption("--device"))


@pytest.fixture
def short_wide_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every way of a wide row within a few thousand columns, which take the interpreter moments: one that stays in
    registers; one of which a part does; and one that is read again."""
    from softxent import launch

    if request.node.get_closest_marker("real_widths"):
        return
    monkeypatch.setattr(launch, "NARROW", 256)
    held, partly = (2, 2, 9), (2, 2, 1)
    monkeypatch.setattr(launch, "WIDE", ((4 << 10, held, held), (8 << 10, partly, partly)))
    monkeypatch.setattr(launch, "WIDEST", (2, 1, 0))


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every value that a function allocates and never writes shows up."""

    def poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.is_floating_point() and tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan"))
            return tensor

        return wrapper

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    yield
