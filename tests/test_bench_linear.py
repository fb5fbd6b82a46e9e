"""From hidden states: who is wrong gets no time, who is not here is named, and the limit is beside the others."""

from typing import Any

import pytest
import torch

from bench import linear
from bench.contenders import Unavailable
from bench.machine import Cpu


def test_right_first_then_in_turns_beside_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    def raising(*_: Any) -> Any:
        raise RuntimeError("no kernel\nand more")

    planted = {
        "eager": linear.eager,
        "wrong": lambda x, w, y: 1.2 * linear.eager(x, w, y),
        "raising": raising,
        "absent": "not installed",
    }
    monkeypatch.setattr(linear, "contenders", lambda device_type: planted)
    x, w, y = linear.inputs((12, 4, 9), torch.float32, True, torch.device("cpu"))
    found = linear.measure(x, w, y, Cpu(), 0.01)
    assert found["eager"]["products"] == 3
    assert set(found["eager"]["times"]) == {1.0} and len(found["limit"]["times"]) == len(found["eager"]["times"])
    assert "times" not in found["wrong"] and found["wrong"]["loss"] == pytest.approx(0.2, rel=1e-3)
    assert linear.row("wrong", found["wrong"]).endswith("| wrong: no time |")
    assert found["raising"] == {"error": "RuntimeError: no kernel"} and found["absent"] == {"error": "not installed"}
    assert "1.00 (1.00-1.00)" in linear.row("eager", found["eager"]) and "| not installed |" in linear.row(
        "a", found["absent"]
    )


def test_products_are_counted_in_whatever_parts_they_are_made() -> None:
    x, w = torch.randn(6, 4), torch.randn(9, 4)

    def in_parts() -> None:
        out = torch.zeros(6, 9)
        torch.mm(x[:2], w.T, out=out[:2])
        torch.addmm(out[2:4], x[2:4], w.T)
        out[4:].addmm_(x[4:], w.T)

    assert linear.counted(in_parts) == 2 * 6 * 4 * 9


def test_everyone_is_right_or_says_why_not() -> None:
    x, w, y = linear.inputs((12, 4, 9), torch.float32, True, torch.device("cpu"))
    exact = linear.step(linear.eager, x, w, y)
    found = linear.contenders("cpu")
    assert {"compile", *linear.PEERS} <= set(found)
    for name, loss_of in found.items():
        if isinstance(loss_of, str):
            assert loss_of and (name in (*linear.PEERS, "compile") or name.startswith("F.linear_cross_entropy, "))
        elif name not in ("compile", "cce"):  # which would compile
            for one, other in zip(linear.step(loss_of, x, w, y), exact, strict=True):
                torch.testing.assert_close(one, other)


def test_a_torch_without_a_layer_of_its_own_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn, "LinearCrossEntropyOptions", raising=False)
    found = linear.contenders("cpu")
    assert found["F.linear_cross_entropy, auto"] == f"PyTorch {torch.__version__} has none"
    assert callable(found["softxent"])


@pytest.mark.parametrize("name", ["liger", "quack"])
def test_peers_of_a_gpu_need_one(name: str) -> None:
    with pytest.raises(Unavailable):
        linear.peer(name, "cpu")
