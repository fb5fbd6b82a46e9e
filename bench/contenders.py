"""Who is compared: a function each, which returns a Contender, or raises Unavailable with the reason.

What cannot run here is said, never left out. A peer's public function runs with its defaults. Those that start from
hidden states, so that logits never exist, are in bench/linear.py.

softxent in other ways, who are asked for by name:
    softxent:group    its classes spread over a group, of this process alone: what the shards' kernels cost
    softxent:W:U:H    wide rows by W warps, U granules of a thread at a time, H times as many held (softxent/launch.py)
"""

import os
import re
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import softxent
from bench.cases import IGNORE_INDEX, SMOOTHING, Case

# (logits, target) -> loss, a number or one a row whose mean is the loss; of softmax: (logits, _) -> probabilities
Function = Callable[[Tensor, Tensor], Tensor]


class Unavailable(Exception):
    """Why a contender cannot run here: not installed, or needs what this machine has not."""


class Unsupported(Exception):
    """What a contender does not do: the op, option, dtype or shape."""


@dataclass(frozen=True)
class Contender:
    version: str
    make: Callable[[Case], Function]  # raises Unsupported
    overwrites: bool = False  # writes the loss's gradient over the logits, and says so


def options_of(case: Case) -> dict[str, Any]:
    """In F.cross_entropy's arguments."""
    options: dict[str, dict[str, Any]] = {
        "smoothing": {"label_smoothing": SMOOTHING},
        "ignored": {"ignore_index": IGNORE_INDEX},
    }
    return options.get(case.kind, {})


def function_of(softmax: Callable[..., Tensor], loss: Callable[..., Tensor], case: Case) -> Function:
    if case.op == "softmax":
        return lambda logits, _: softmax(logits, 1)
    options = options_of(case)
    return lambda logits, target: loss(logits, target, **options)


def ours(device_type: str) -> Contender:
    """The Triton kernels on a GPU, torch operations on a CPU."""

    def softmax(logits: Tensor, dim: int) -> Tensor:
        return softxent.softmax(logits, dim)  # which an older version, in a comparison, need not have

    return Contender(softxent.__version__, lambda case: function_of(softmax, softxent.fused_softmax_xent, case))


class Fresh(torch.autograd.Function):
    """Logits in the leaf's memory that are not the leaf: as a layer's output, they may be written over."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor) -> Tensor:
        return leaf.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        return grad_outputs[0]


def ours_in_place(device_type: str) -> Contender:
    """With the gradient written over the logits: no second matrix at all."""

    def make(case: Case) -> Function:
        if case.mode == "forward" or case.op == "softmax":
            raise Unsupported("there is no gradient to write over the logits")
        options = options_of(case)
        return lambda x, target: softxent.fused_softmax_xent(Fresh.apply(x), target, inplace=True, **options)

    return Contender(softxent.__version__, make, overwrites=True)


def ours_in_a_group(device_type: str) -> Contender:
    """On a GPU by NCCL, which copies what one process exchanges with itself. A step is 3 B, where least bytes are 2."""
    from torch._C._distributed_c10d import HashStore

    if not dist.is_initialized():
        backend = "nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)

    def make(case: Case) -> Function:
        if case.op == "softmax":
            raise Unsupported("softmax is of all classes")
        given = options_of(case) | {"group": dist.group.WORLD, "vocab_size": case.n_cols}
        return lambda x, target: softxent.vocab_parallel_softmax_xent(x, target, **given)

    return Contender(softxent.__version__, make)


def ours_in_shape(shape: tuple[int, ...], device_type: str) -> Contender:
    """Of what is launched in forward: where the gradient is made, but for a scaled loss."""
    from softxent import launch

    def make(case: Case) -> Function:
        function = ours(device_type).make(case)

        def run(logits: Tensor, target: Tensor) -> Tensor:
            with patch.multiple(launch, WIDE=(), WIDEST=shape):
                return function(logits, target)

        return run

    return Contender(softxent.__version__, make)


def make_eager(case: Case) -> Function:
    return function_of(F.softmax, F.cross_entropy, case)


def eager(device_type: str) -> Contender:
    """PyTorch as it is: F.cross_entropy and F.softmax."""
    return Contender(torch.__version__, make_eager)


def compiled(device_type: str) -> Contender:
    """torch.compile of what `eager` calls: all of it one graph, for one shape (dynamic=False), and its backward too.

    The function is compiled; autograd through it runs the backward that AOTAutograd made of the same graph. Inductor's
    defaults. On a CPU it writes C++, on a GPU Triton.
    """
    need_compiler(device_type)
    return Contender(torch.__version__, lambda case: compile_anew(make_eager(case)))


def need_compiler(device_type: str) -> None:
    """What Inductor hands its code to. Raises Unavailable."""
    if device_type != "cpu":
        if find_spec("triton") is None:
            raise Unavailable("Triton is not installed")
        return
    compiler, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C++ compiler ({compiler})")
    if not headers.exists():
        raise Unavailable(f"Inductor's C++ includes {headers}, which is not installed")
    for folder in (Path(torch.__file__).parent, headers.parent):
        if " " in str(folder):
            raise Unavailable(f"Inductor's command for the C++ compiler breaks at the space in {folder}")


def compile_anew(function: Function) -> Function:
    """Compiled, and what was compiled before forgotten: a line of code may have only so many versions."""
    torch.compiler.reset()
    # What it finds by timing is not kept: `python -m bench gpu` compiles in several processes, who disturb each other.
    alone: dict[str, Any] = {"autotune_local_cache": False}
    found: Function = torch.compile(function, fullgraph=True, dynamic=False, options=alone)
    return found


def liger(device_type: str) -> Contender:
    """Liger's liger_cross_entropy, its replacement of F.cross_entropy, and liger_softmax, in Triton.

    The loss's kernel makes the gradient in forward, over the logits; without autograd too it writes over the ignored
    rows. Loss and gradient are those of the mean. It waits for the device in forward and in backward.
    """
    module, version = need("liger_kernel.transformers.functional", "liger-kernel", device_type)

    def make(case: Case) -> Function:
        only(case, "smoothing", "ignored")
        return function_of(lambda logits, _: module.liger_softmax(logits), module.liger_cross_entropy, case)

    return Contender(version, make, overwrites=True)


def quack(device_type: str) -> Contender:
    """QuACK's cross-entropy and softmax, in the CuTe DSL, for Hopper and Blackwell.

    By default backward writes into a matrix of its own (inplace_backward=False). Its mean divides by the targets that
    are not ignored. It compiles a kernel for each number of columns.
    """
    module, version = need("quack", "quack-kernels", device_type)

    def make(case: Case) -> Function:
        only(case, "ignored")
        if case.op == "softmax" and case.n_cols * case.torch_dtype.itemsize % 16:
            raise Unsupported("rows that are no multiple of 16 bytes")
        return function_of(lambda logits, _: module.softmax(logits), module.cross_entropy, case)

    return Contender(version, make)


def need(module: str, distribution: str, device_type: str) -> tuple[ModuleType, str]:
    """A peer's module, and its version. Raises Unavailable."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        raise Unavailable("not installed") from None
    if device_type != "cuda":
        raise Unavailable("needs a GPU")
    try:
        return import_module(module), version
    except Exception as error:  # of whatever kind: a missing library, a GPU that is not there, an old torch
        raise Unavailable(f"{version} is installed but cannot be imported: {type(error).__name__}: {error}") from error


def only(case: Case, *kinds: str) -> None:
    """Raises Unsupported for a kind of work that is not among these."""
    reasons = {
        "smoothing": "no label smoothing",
        "soft": "no probabilities as targets",
        "ignored": "no ignore_index",
    }
    if case.kind in reasons and case.kind not in kinds:
        raise Unsupported(reasons[case.kind])


class Registry(dict[str, Callable[[str], Contender]]):
    """Everyone who is compared; and who is asked for by name."""

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or re.fullmatch(r"softxent:(group|\d+:\d+:\d+)", str(name)) is not None

    def __missing__(self, name: str) -> Callable[[str], Contender]:
        if name not in self:
            raise KeyError(name)
        shape = name.split(":")[1:]
        return ours_in_a_group if shape == ["group"] else partial(ours_in_shape, tuple(map(int, shape)))


REGISTRY = Registry(
    {
        "softxent": ours,
        "softxent-inplace": ours_in_place,
        "eager": eager,
        "compile": compiled,
        "liger": liger,
        "quack": quack,
    }
)


def load(name: str, device_type: str) -> Contender:
    """Raises KeyError where there is no such contender, and Unavailable with the reason where it cannot run."""
    return REGISTRY[name](device_type)
