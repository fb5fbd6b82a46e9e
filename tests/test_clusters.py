"""Rows held by a cluster of programs, which is off by default: its arithmetic, and what it moves."""

from importlib.metadata import version
from importlib.util import find_spec

import pytest
import torch

from bench.traffic import counted, step
from softxent import fused_softmax_xent, launch
from test_functional import check, make

TRITON = tuple(int(part) for part in version("triton").split(".")[:2]) if find_spec("triton") else (0, 0)
pytestmark = [
    pytest.mark.parametrize("path", ["kernels"], indirect=True),
    pytest.mark.skipif(
        f"config.getoption('--device') != 'cpu' and {TRITON} < (3, 8)", reason="Triton 3.8 is the first with clusters"
    ),
]


@pytest.fixture(autouse=True)
def clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "CLUSTERS", True)


@pytest.mark.parametrize("n_cols", [90001, 90008, 131072])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_same_loss_and_gradient(path: str, device: torch.device, n_cols: int, dtype: torch.dtype) -> None:
    check(*make(2, n_cols, dtype, device), reduction="mean")
    logits, target = make(2, n_cols, dtype, device)
    target[0], target[1] = 0, n_cols - 1
    check(logits, target, reduction="none")


def test_equal_logits_of_the_widest_odd_row_do_not_overflow_their_integers(path: str, device: torch.device) -> None:
    logits = torch.zeros(1, 262141, dtype=torch.bfloat16, device=device)
    loss = fused_softmax_xent(logits, torch.zeros(1, dtype=torch.int64, device=device), loss_dtype=torch.float32)
    torch.testing.assert_close(loss, torch.tensor(262141.0, device=device).log())


@pytest.mark.skipif("config.getoption('--device') != 'cpu'", reason="counted in the interpreter")
def test_the_logits_are_read_once(path: str, device: torch.device) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        logits, target = make(2, 90001, dtype, device)
        with counted() as launches:
            step(fused_softmax_xent, logits.requires_grad_(), target)
        (rows,) = (launch for launch in launches if launch.kernel == "step_kernel")
        size = logits.numel() * logits.itemsize
        assert rows.loaded["logits_ptr"] <= size + 64 and rows.stored["dlogits_ptr"] <= size + 64


def test_only_where_they_compile_without_spills(path: str) -> None:
    hopper, ampere, amd = launch.Device(32, 90), launch.Device(32, 80), launch.Device(64, 0)
    for n_cols, itemsize, ctas in ((90000, 2, 4), (90001, 2, 4), (262144, 2, 8), (65536, 4, 4), (262144, 4, 8)):
        tile = launch.whole(n_cols, n_cols, 1, itemsize, 0, launch.Holds(), hopper)
        assert tile is not None and tile.num_ctas == ctas and tile.block_n // ctas <= 32768
        for device in (ampere, amd):
            assert launch.whole(n_cols, n_cols, 1, itemsize, 0, launch.Holds(), device) is None
    assert launch.whole(262141, 262141, 1, 4, 0, launch.Holds(), hopper) is None
    assert launch.whole(131072, 131072, 1, 4, 0, launch.Holds(smoothing=True), hopper) is None
