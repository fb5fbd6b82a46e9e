"""Every contender loads or says why not, and does the work; peers are planted: their signatures, in plain torch."""

import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from bench import contenders
from bench.alone import import_alone
from bench.cases import DTYPES, KINDS, MODES, OPS, Case, inputs
from bench.contenders import REGISTRY, Unavailable, Unsupported
from bench.correctness import check
from bench.work import Work
from softxent import dispatch

HERE = ("softxent", "softxent-inplace", "eager", "softxent-softmax", "eager-softmax")
TOPS = ("apex", "flash_attn", "liger_kernel", "quack", "transformer_engine", "transformers", "unsloth", "unsloth_zoo")
DISTRIBUTIONS = ("apex", "flash-attn", "liger-kernel", "quack-kernels", "transformer-engine", "unsloth")
RAISES = 'raise ImportError("no compiled extension")\n'
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
    "flash_attn/__init__.py": RAISES,
    "flash_attn/ops/__init__.py": "",
    "flash_attn/ops/triton/__init__.py": "",
    "flash_attn/ops/triton/cross_entropy.py": HEAD
    + """
def cross_entropy_loss(logits, labels, precomputed_lse=None, label_smoothing=0.0, logit_scale=1.0,
                       lse_square_scale=0.0, ignore_index=-100, inplace_backward=False, process_group=None):
    assert precomputed_lse is process_group is None and logit_scale == 1 and lse_square_scale == 0
    losses = F.cross_entropy(logits.float(), labels, ignore_index=ignore_index, label_smoothing=label_smoothing,
                             reduction="none")
    return losses, torch.zeros_like(losses)
""",
    "transformer_engine/__init__.py": RAISES,
    "transformer_engine/pytorch/__init__.py": RAISES,
    "transformer_engine/pytorch/jit.py": RAISES,
    "transformer_engine/pytorch/cross_entropy.py": HEAD
    + """
from transformer_engine.pytorch.jit import no_torch_dynamo

@no_torch_dynamo()
def parallel_cross_entropy(inp, target, label_smoothing=0.0, reduce_loss=False, dist_process_group=None,
                           ignore_idx=-100, is_cg_capturable=False, *, overwrite_input=False, _input=None):
    assert inp.dim() == 3 and target.numel() == inp.shape[0] * inp.shape[1] and dist_process_group is None
    losses = F.cross_entropy(inp.flatten(0, 1).float(), target.flatten(), ignore_index=ignore_idx,
                             label_smoothing=label_smoothing, reduction="none")
    if reduce_loss:
        return losses.sum() / (target != ignore_idx).sum()
    return losses.reshape(inp.shape[:2])
""",
    "unsloth/__init__.py": RAISES,
    "unsloth/kernels/__init__.py": RAISES,
    "unsloth/kernels/cross_entropy_loss.py": HEAD
    + """
from transformers.models.llama.modeling_llama import logger
from unsloth_zoo.loss_utils import patch_loss_functions, post_patch_loss_function
from unsloth_zoo.utils import Version
assert Version(torch.__version__) > Version("2.0")

def fast_cross_entropy_loss(logits, labels, logit_softcapping=0, logit_scaling=0, n_items=None):
    batch, sequence, d = logits.shape
    assert labels.shape == (batch, sequence) and logit_softcapping == logit_scaling == 0
    losses = F.cross_entropy(logits.reshape(-1, d).float(), labels.reshape(-1), reduction="none")
    return losses.sum() / (torch.count_nonzero(labels != -100) if n_items is None else n_items)
""",
    "apex/__init__.py": "",
    "apex/contrib/__init__.py": "",
    "apex/contrib/xentropy/__init__.py": HEAD
    + """
class SoftmaxCrossEntropyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, labels, smoothing=0.0, padding_idx=0, half_to_float=False):
        assert bool((0 <= labels).all() and (labels < logits.shape[1]).all())
        assert half_to_float == (logits.itemsize == 2)
        ctx.save_for_backward(logits, labels)
        ctx.smoothing, ctx.padding_idx = smoothing, padding_idx
        losses = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing, reduction="none")
        return losses.masked_fill_(labels == padding_idx, 0)

    @staticmethod
    def backward(ctx, dlosses):
        logits, labels = ctx.saved_tensors
        with torch.enable_grad():
            leaf = logits.detach().requires_grad_()
            losses = F.cross_entropy(leaf.float(), labels, label_smoothing=ctx.smoothing, reduction="none")
        dlosses = dlosses.contiguous().masked_fill_(labels == ctx.padding_idx, 0)
        return torch.autograd.grad(losses, leaf, dlosses)[0], None, None, None, None
""",
}
# What a peer does not do
KINDS_LEFT_OUT = {
    "liger": {"soft"},
    "quack": {"soft", "smoothing"},
    "flash-attn": {"soft"},
    "transformer-engine": {"soft"},
    "unsloth": {"soft", "smoothing"},
    "apex": {"soft", "ignored"},
    "liger-softmax": set(),
    "quack-softmax": set(),
}


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


def cases(op: str, n_cols: int = 8) -> list[Case]:
    kinds = KINDS if op == "cross_entropy" else KINDS[:1]
    return [Case(op, 12, n_cols, dtype, mode, kind) for dtype in DTYPES for mode in MODES for kind in kinds]


@pytest.mark.parametrize("name", REGISTRY)
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_a_contender_loads_or_says_why_not(name: str, device_type: str) -> None:
    try:
        contender = contenders.load(name, device_type)
    except Unavailable as error:
        assert str(error).strip()
    else:
        assert contender.name == name and contender.op in OPS and contender.version


@pytest.mark.parametrize("name", HERE)
def test_a_contender_does_the_work(name: str) -> None:
    for case in cases("softmax" if name.endswith("softmax") else "cross_entropy"):
        if name == "softxent-inplace" and case.mode == "forward":
            with pytest.raises(Unsupported):
                wrong(name, case, "cpu")
            continue
        assert isinstance(found := wrong(name, case, "cpu"), dict), (case, found)


def test_a_compiled_contender_does_the_work() -> None:
    try:
        contenders.load("compile", "cpu")
    except Unavailable as error:
        pytest.skip(str(error))
    case = Case("cross_entropy", 6, 24, "float32", "step")
    assert isinstance(found := wrong("compile", case, "cpu"), dict), found


@pytest.mark.parametrize("name", ["compile", "compile-softmax"])
def test_a_compiled_contender_needs_a_compiler(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(Unavailable, match="no-such-compiler"):
        contenders.load(name, "cpu")


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
    for case in cases(contender.op):
        if case.kind in KINDS_LEFT_OUT[name]:
            with pytest.raises(Unsupported):
                wrong(name, case, "cuda")
        else:
            assert isinstance(found := wrong(name, case, "cuda"), dict), (case, found)


def test_what_a_peer_cannot_do_is_said(planted: Path) -> None:
    with pytest.raises(Unsupported, match="16 bytes"):
        wrong("quack-softmax", Case("softmax", 6, 9, "bfloat16", "forward"), "cuda")
    with pytest.raises(Unsupported, match="float16"):
        wrong("transformer-engine", Case("cross_entropy", 6, 9, "float16", "forward"), "cuda")


def test_a_transformer_engine_that_overwrites_is_known_to(planted: Path) -> None:
    file = planted / "transformer_engine/pytorch/cross_entropy.py"
    file.write_text("def parallel_cross_entropy(*arguments): ...")
    assert contenders.load("transformer-engine", "cuda").overwrites


def test_a_peer_that_cannot_be_imported_says_why(planted: Path) -> None:
    (planted / "quack/__init__.py").write_text("import no_such_library")
    with pytest.raises(Unavailable, match=r"1\.2\.3 .*no_such_library"):
        contenders.load("quack", "cuda")
    (planted / "apex/contrib/xentropy/__init__.py").write_text("print('no --xentropy')")
    with pytest.raises(Unavailable, match="--xentropy"):
        contenders.load("apex", "cuda")


def test_a_module_alone_leaves_no_trace(planted: Path) -> None:
    stand_ins = {"transformer_engine.pytorch.jit": {"no_torch_dynamo": lambda: lambda function: function}}
    before, path = dict(sys.modules), list(sys.meta_path)
    module = import_alone("transformer_engine.pytorch.cross_entropy", stand_ins)
    assert module.parallel_cross_entropy is not None
    assert {name for name in sys.modules if name.split(".")[0] in TOPS} == set() and sys.meta_path == path
    assert before.items() <= sys.modules.items()
    with pytest.raises(ImportError, match="extension"):
        import_module("transformer_engine.pytorch.cross_entropy")


def test_the_tutorial_softmax_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    for n_cols in (24, 33):
        for case in cases("softmax", n_cols):
            if case.mode != "forward":
                with pytest.raises(Unsupported):
                    wrong("tutorial-softmax", case, "cuda")
            else:
                assert isinstance(found := wrong("tutorial-softmax", case, "cuda"), dict), found
    with pytest.raises(Unsupported, match="columns"):
        wrong("tutorial-softmax", Case("softmax", 1, 65537, "float32", "forward"), "cuda")


def test_a_mistake_is_found(planted: Path) -> None:
    """So the planted peers do test their adapters: one whose mean counts the ignored rows, say."""
    file = planted / "unsloth/kernels/cross_entropy_loss.py"
    file.write_text(file.read_text().replace("torch.count_nonzero(labels != -100)", "labels.numel()"))
    found = wrong("unsloth", Case("cross_entropy", 6, 24, "float32", "step", "ignored"), "cuda")
    assert isinstance(found, str) and "loss" in found
