"""The two ways through the package, as the fixture `path`: torch operations, and the kernels.

Without a GPU the kernels run in Triton's interpreter. `pytest --device cuda` runs them on the GPU, and nothing else.
"""

import os
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes: their threads would wait for each other's cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch

import pytest
import torch

PATHS = ("torch", "kernels")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where the kernels run")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu" and find_spec("triton"):
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
        import interpreter

        interpreter.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") == "cuda":
        kept = [item for item in items if _runs_kernels(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


def _runs_kernels(item: Any) -> bool:
    return hasattr(item, "callspec") and item.callspec.params.get("path") == "kernels"


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
