"""Every contender loads or says why not, and does the work; peers are planted: their signatures, in plain torch."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import contenders
from bench.cases import DTYPES, KINDS, MODES, Case, inputs
from bench.contenders import REGISTRY, Unavailable, Unsupported
from bench.correctness import check
from bench.work import Work
from softxent import dispatch, launch

HERE = ("softxent", "softxent-inplace", "eager")
TOPS = ("liger_kernel", "quack")
DISTRIBUTIONS = ("liger-kernel", "quack-kernels")
HEAD = "import torch\nimport torch.nn.functional as F\n"
FILES = {
    "liger_kernel/__init__.py": "",
    "liger_kernel/transformers/__init__.py": "",
    "liger_kernel/transformers/functional.py": HEAD
    + """
class Over(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, target, ignore_index, label_smoothing):
        assert ignore_index == -100
        ctx.logits = logits.detach()
        with torch.enable_grad():
            leaf = logits.detach().float().requires_grad_()
            loss = F.cross_entropy(leaf, target, label_smoothing=label_smoothing)
            ctx.logits.copy_(torch.autograd.grad(loss, leaf)[0])
        return loss.detach().to(logits.dtype)

    @staticmethod
    def backward(ctx, dloss):
        return ctx.logits.mul_(dloss), None, None, None

def liger_cross_entropy(input, target, weight=None, size_average=None, ignore_index=-100, reduce=None,
                        reduction="mean", label_smoothing=0.0, lse_square_scale=0.0, softcap=None):
    assert weight is size_average is reduce is softcap is None and reduction == "mean"
    return Over.apply(input, target, ignore_index, label_smoothing)

def liger_softmax(x):
    return F.softmax(x, -1)
""",
    "quack/__init__.py": HEAD
    + """
def cross_entropy(x, target, lse_partial=None, weight=None, ignore_index=-100, reduction="mean",
                  inplace_backward=False):
    assert lse_partial is None and weight is None and target.dim() == 1 and not inplace_backward
    return F.cross_entropy(x.float(), target, ignore_index=ignore_index, reduction=reduction)

def softmax(x):
    assert x.shape[1] * x.itemsize % 16 == 0
    return F.softmax(x, 1)
""",
}
KINDS_LEFT_OUT = {"liger": {"soft"}, "quack": {"soft", "smoothing"}}  # what a peer does not do


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages of the peers' names, before any real ones."""
    for name in [name for name in sys.modules if name.split(".")[0] in TOPS]:
        monkeypatch.delitem(sys.modules, name)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for name in DISTRIBUTIONS:
        folder = tmp_path / f"{name.replace('-', '_')}-1.2.3.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.3\n")
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def torch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", False)


def wrong(name: str, case: Case, device_type: str) -> dict[str, float] | str:
    """The errors, or in words what is wrong. Raises Unsupported."""
    contender = contenders.load(name, device_type)
    work = Work(contender, case)
    return check({name: work}, case, inputs(case, torch.device("cpu"), 0), [1, 2])[name]


def cases(n_cols: int = 8) -> list[Case]:
    kinds = [("cross_entropy", kind) for kind in KINDS] + [("softmax", "mean")]
    return [Case(op, 12, n_cols, dtype, mode, kind) for dtype in DTYPES for mode in MODES for op, kind in kinds]


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_contender_loads_or_says_why_not(name: str, device_type: str) -> None:
    try:
        contender = contenders.load(name, device_type)
    except Unavailable as error:
        assert str(error).strip()
    else:
        assert contender.version


@pytest.mark.parametrize("name", HERE)
def test_a_contender_does_the_work(name: str) -> None:
    for case in cases():
        if name == "softxent-inplace" and (case.mode == "forward" or case.op == "softmax"):
            with pytest.raises(Unsupported):
                wrong(name, case, "cpu")
            continue
        assert isinstance(found := wrong(name, case, "cpu"), dict), (case, found)


def test_softxent_in_a_group_of_one_process_does_the_work() -> None:
    try:
        for case in cases():
            if case.op == "softmax":
                with pytest.raises(Unsupported):
                    wrong("softxent:group", case, "cpu")
            else:
                assert isinstance(found := wrong("softxent:group", case, "cpu"), dict), (case, found)
    finally:
        torch.distributed.destroy_process_group()


def test_softxent_in_a_shape_of_its_own_launches_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "INTERPRET", True)
    seen, wide = [], launch.wide

    def noted(*how: Any, **named: Any) -> tuple[int, int, int]:
        seen.append(wide(*how, **named))
        return seen[-1]

    monkeypatch.setattr(launch, "wide", noted)
    case = Case("cross_entropy", 3, 2000, "float32", "step")
    assert isinstance(found := wrong("softxent:1:4:2", case, "cpu"), dict), found
    assert set(seen) == {(32, 4, 2)}
    assert "softxent:1:4:2" not in [*REGISTRY], "only who is asked for"
    for name in ("softxent:1:4", "liger:group", "softxent:"):
        assert name not in REGISTRY
        with pytest.raises(KeyError):
            contenders.load(name, "cpu")


def test_a_compiled_contender_does_the_work() -> None:
    try:
        contenders.load("compile", "cpu")
    except Unavailable as error:
        pytest.skip(str(error))
    case = Case("cross_entropy", 6, 24, "float32", "step")
    assert isinstance(found := wrong("compile", case, "cpu"), dict), found


def test_a_compiled_contender_needs_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match="no-such-compiler"):
        contenders.load("compile", "cpu")


def test_a_compiled_contender_needs_pythons_headers_and_a_path_without_spaces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", sys.executable)  # there is one
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
    with pytest.raises(Unavailable, match=r"Python\.h"):
        contenders.load("compile", "cpu")
    (tmp_path / "Python.h").touch()
    for folder, is_broken in (("a b", True), ("ab", False)):
        monkeypatch.setattr(torch, "__file__", f"/{folder}/torch/__init__.py")
        if is_broken:
            with pytest.raises(Unavailable, match="space in /a b/torch"):
                contenders.load("compile", "cpu")
        else:
            contenders.load("compile", "cpu")


@pytest.mark.parametrize("name", KINDS_LEFT_OUT)
def test_an_adapter_gives_its_peer_the_work(name: str, planted: Path) -> None:
    with pytest.raises(Unavailable, match="GPU"):
        contenders.load(name, "cpu")
    contender = contenders.load(name, "cuda")
    assert contender.version == "1.2.3" and contender.overwrites == (name == "liger")
    for case in cases():
        if case.kind in KINDS_LEFT_OUT[name]:
            with pytest.raises(Unsupported):
                wrong(name, case, "cuda")
        else:
            assert isinstance(found := wrong(name, case, "cuda"), dict), (case, found)


def test_what_a_peer_cannot_do_is_said(planted: Path) -> None:
    with pytest.raises(Unsupported, match="16 bytes"):
        wrong("quack", Case("softmax", 6, 9, "bfloat16", "forward"), "cuda")


def test_a_peer_that_cannot_be_imported_says_why(planted: Path) -> None:
    (planted / "quack/__init__.py").write_text("import no_such_library")
    with pytest.raises(Unavailable, match=r"1\.2\.3 .*no_such_library"):
        contenders.load("quack", "cuda")


def test_a_mistake_is_found(planted: Path) -> None:
    """So the planted peers do test their adapters: one whose mean counts the ignored rows, say."""
    file = planted / "quack/__init__.py"
    file.write_text(file.read_text().replace("reduction=reduction)", "reduction='sum') / len(target)"))
    found = wrong("quack", Case("cross_entropy", 6, 24, "float32", "step", "ignored"), "cuda")
    assert isinstance(found, str) and "loss" in found
