"""Bytes that a training step moves, counted: python bench/traffic.py prints them as multiples of B, the logits' bytes.

The kernels run in Triton's interpreter, where each active lane of a load or store is counted, as often as it happens;
nothing is timed, and no GPU is needed. What a narrow or strided access moves besides is not seen. Of eager PyTorch the
inputs and outputs of each operation are counted, once each, which is the least that its kernels can move. Of peers
(requirements/bench.txt) whose kernels are Triton's both are counted: their kernels as ours, and their operations, in
tensors as large as the logits; each is checked against PyTorch first. A step must read the logits once and write their
gradient once: 2.0. Scaled: the incoming gradient is not 1.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    for folder in ("kernels", "tests", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench import contenders, pretend
from bench.cases import Case, inputs
from bench.contenders import Contender, Unsupported
from bench.correctness import LOSS, check
from bench.work import Work


@dataclass
class Launch:
    kernel: str
    loaded: dict[str, int] = field(default_factory=dict)  # bytes, by the name of the kernel's argument
    touched: dict[str, int] = field(default_factory=dict)  # of them those loaded for the first time: from memory
    stored: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)  # of the arguments' memory

    def moved(self, least: int) -> int:
        """Bytes of arguments of at least that size, loaded and stored."""
        large = [name for name, size in self.sizes.items() if size >= least]
        return sum(moved.get(name, 0) for name in large for moved in (self.loaded, self.stored))


@contextlib.contextmanager
def counted() -> Iterator[list[Launch]]:
    """The launches meanwhile, with the bytes that they load and store. In a process of TRITON_INTERPRET=1."""
    from triton.runtime.interpreter import GridExecutor, InterpreterBuilder

    launches: list[Launch] = []
    regions: list[tuple[str, int, int]] = []
    seen: dict[str, np.ndarray[Any, Any]] = {}  # of a region, which bytes were loaded
    call = GridExecutor.__call__
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def count(into: dict[str, int], pointers: Any, mask: Any, touched: dict[str, int] | None = None) -> None:
        itemsize = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        addresses = np.asarray(pointers.data)
        addresses = addresses[np.broadcast_to(np.asarray(mask.data, bool), addresses.shape)]
        for name, low, high in regions:
            of_region = addresses[(addresses >= low) & (addresses < high)]
            if len(of_region):
                into[name] = into.get(name, 0) + len(of_region) * itemsize
                if touched is not None:
                    at = np.unique(of_region - low)
                    touched[name] = touched.get(name, 0) + int((~seen[name][at]).sum()) * itemsize
                    seen[name][at] = True

    def counting_load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        count(launches[-1].loaded, pointers, mask, launches[-1].touched)
        return load(self, pointers, mask, *rest)

    def counting_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(launches[-1].stored, pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def launch(self: Any, *args: Any, **kwargs: Any) -> Any:
        launches.append(Launch(self.fn.__name__))
        regions.clear()
        seen.clear()
        for name, value in _named((*zip(self.arg_names, args, strict=False), *kwargs.items())):
            if isinstance(value, Tensor):
                storage = value.untyped_storage()
                if any(low == storage.data_ptr() for _, low, _ in regions):  # written in place
                    continue
                regions.append((name, storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
                launches[-1].sizes[name] = storage.nbytes()
                seen[name] = np.zeros(storage.nbytes(), bool)
        with _disable_current_modes():  # the interpreter works with torch itself
            return call(self, *args, **kwargs)

    GridExecutor.__call__ = launch
    InterpreterBuilder.create_masked_load = counting_load
    InterpreterBuilder.create_masked_store = counting_store
    try:
        yield launches
    finally:
        GridExecutor.__call__ = call
        InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store = load, store


def _named(arguments: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """With the fields of named tuples as arguments of their own."""
    for name, value in arguments:
        if hasattr(value, "_asdict"):
            fields = value._asdict().items()
            yield from _named((part if part.endswith("_ptr") else f"{name}.{part}", one) for part, one in fields)
        else:
            yield name, value


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


class Operations(TorchDispatchMode):
    """The operations of torch that work on a device, the bytes of their inputs and outputs, and what they allocate."""

    WITHOUT_WORK = (
        *("empty", "empty_like", "empty_strided", "new_empty", "view", "_unsafe_view", "detach", "alias", "as_strided"),
        *("slice", "select", "unsqueeze", "squeeze", "expand", "t", "transpose", "permute", "item"),
        *("_local_scalar_dense", "promote_types"),
    )

    HARDLY_READ = ("nll_loss_forward", 0), ("nll_loss_backward", 1)  # of which argument a value a row is read, or none

    def __init__(self, least: int = 0) -> None:
        super().__init__()
        self.least = least  # bytes of a tensor that is counted
        self.names: list[str] = []
        self.bytes = 0
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        given = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        made = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in _tensors(out)}
        self.allocated += sum(size for address, size in made.items() if address not in given)
        if name not in self.WITHOUT_WORK:
            self.names.append(name)
            read = [x for i, x in enumerate(args) if (name, i) not in self.HARDLY_READ]
            sizes = {x.data_ptr(): x.numel() * x.itemsize for x in _tensors((read, kwargs, out))}
            self.bytes += sum(size for size in sizes.values() if size >= self.least)
        return out


def step(
    op: Callable[..., Any], logits: Tensor, target: Tensor, *arguments: Any, dloss: float = 1.0, **options: Any
) -> Tensor:
    loss = op(logits, target, *arguments, **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    (gradient,) = torch.autograd.grad(loss, logits, torch.full_like(loss, dloss))
    return gradient


def example(n_rows: int, n_cols: int, dtype: torch.dtype, stride: int | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_cols)
    logits = torch.randn(n_rows, stride or n_cols, generator=generator).to(dtype)[:, :n_cols]
    return logits.requires_grad_(), torch.randint(n_cols, (n_rows,), generator=generator)


class Moved(NamedTuple):
    """A step by softxent's kernels. Multiples of B."""

    kernels: list[str]
    loaded: float  # logits, and their gradient
    stored: float  # gradient
    allocated: float  # all that was asked for, freed or not


def ours(n_rows: int, n_cols: int, dtype: torch.dtype, **options: Any) -> Moved:
    from softxent import fused_softmax_xent

    logits, target = example(n_rows, n_cols, dtype)
    size = logits.numel() * logits.itemsize
    logits = logits * 1 if options.get("inplace") else logits
    with Operations() as operations, counted() as launches:
        step(fused_softmax_xent, logits, target, **options)
    names = ("logits_ptr", "dlogits_ptr", "values_ptr")
    loaded = sum(launch.loaded.get(name, 0) for launch in launches for name in names)
    stored = sum(launch.stored.get(name, 0) for launch in launches for name in names)
    kernels = [launch.kernel.removesuffix("_kernel") for launch in launches]
    return Moved(kernels, loaded / size, stored / size, operations.allocated / size)


def eager(n_rows: int, n_cols: int, dtype: torch.dtype, **options: Any) -> float:
    """B of a step by eager PyTorch."""
    logits, target = example(n_rows, n_cols, dtype)
    with Operations() as operations:
        step(F.cross_entropy, logits, target, **options)
    return float(operations.bytes / (logits.numel() * logits.itemsize))


def moved_by(contender: Contender, case: Case, on_gpu: bool) -> str:
    """B that a contender's kernels and operations move, or why it cannot be said."""
    case = case._replace(n_rows=min(case.n_rows, ROWS))
    try:
        with pretend.gpu() if on_gpu else contextlib.nullcontext():
            work = Work(contender, case)
            made = inputs(case, torch.device("cpu"), seed=0)
            if on_gpu and case.torch_dtype in LOSS:
                wrong = check({contender.name: work}, case, made, [1])[contender.name]
                if isinstance(wrong, str):
                    return wrong
            with Operations(case.matrix_bytes) as operations, counted() as launches:
                work.once(made)
    except Unsupported as error:
        return str(error)
    moved = operations.bytes + sum(launch.moved(case.matrix_bytes) for launch in launches)
    return f"{moved / case.matrix_bytes:.2f}"


ROWS = 8  # of a contender's case: its kernels' programs have a row each
SHAPES = (
    *((256, 10), (1024, 10), (512, 100), (64, 1000), (8, 32000)),
    *((4, 50257), (4, 128256), (4, 151936), (2, 262144)),
)
MODES: dict[str, dict[str, Any]] = {
    "mean": {},
    "mean, in place": {"inplace": True},
    "mean, scaled": {"dloss": 0.5},
    "none": {"reduction": "none"},
}


def main() -> None:
    import triton

    import interpreter
    from softxent import dispatch

    interpreter.install()
    dispatch.INTERPRET = True
    found, reasons = pretend.peers("cross_entropy")
    softmaxes, softmax_reasons = pretend.peers("softmax")
    print(f"torch {torch.__version__.split('+')[0]}, triton {triton.__version__}, in Triton's interpreter\n")
    print(*pretend.versions(found | softmaxes, reasons | softmax_reasons), sep="\n")
    sections = (
        ("Cross-entropy", cross_entropy(found)),
        ("Cross-entropy with probabilities", matrices(found, "cross_entropy", "soft", ("softxent", "eager"))),
        ("Softmax", matrices(softmaxes, "softmax", "mean", ("softxent-softmax", "eager-softmax"))),
    )
    for title, lines in sections:
        print(f"\n## {title}\n")
        for line in lines:
            print(line, flush=True)


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def cross_entropy(found: dict[str, Contender]) -> Iterator[str]:
    yield row(
        *("n_rows x n_cols", "dtype", "mode", "kernels", "logits read", "gradient written", "step"),
        *("allocated", "eager PyTorch", *found),
    )
    yield "|---|---|---|---|" + "---:|" * (5 + len(found))
    for n_rows, n_cols in SHAPES:
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            for mode, options in MODES.items():
                if dtype == torch.float16 and mode != "mean":
                    continue
                moved = ours(n_rows, n_cols, dtype, **options)
                name = str(dtype).removeprefix("torch.")
                eagerly = eager(n_rows, n_cols, dtype, **{k: v for k, v in options.items() if k != "inplace"})
                kind = {"mean": "mean", "mean, scaled": "scaled"}.get(mode)
                case = Case("cross_entropy", n_rows, n_cols, name, "step", kind or "")
                yield row(
                    *(f"{n_rows} x {n_cols}", name, mode, ", ".join(moved.kernels)),
                    *(f"{x:.2f}" for x in (moved.loaded, moved.stored, moved.loaded + moved.stored)),
                    *(f"{moved.allocated:.2f}", f"{eagerly:.2f}"),
                    *(moved_by(one, case, on_gpu=True) if kind else "" for one in found.values()),
                )


def matrices(found: dict[str, Contender], op: str, kind: str, names: tuple[str, str]) -> Iterator[str]:
    """Of ops that read and write matrices: B that are moved, beside the least."""
    here = [contenders.load(name, "cpu") for name in names]
    yield row("n_rows x n_cols", "dtype", "mode", "least", "softxent", "eager PyTorch", *found)
    yield "|---|---|---|" + "---:|" * (3 + len(found))
    for n_rows, n_cols in (shape for shape in SHAPES if shape[1] <= 65536):
        for dtype in ("bfloat16", "float32"):
            for mode in ("forward", "step"):
                case = Case(op, n_rows, n_cols, dtype, mode, kind)
                yield row(
                    *(f"{n_rows} x {n_cols}", dtype, mode, f"{case.least_bytes / case.matrix_bytes:.2f}"),
                    *(moved_by(one, case, on_gpu=False) for one in here),
                    *(moved_by(one, case, on_gpu=True) for one in found.values()),
                )


if __name__ == "__main__":
    main()
