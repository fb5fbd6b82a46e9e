"""Bytes that a training step moves, counted: python bench/traffic.py prints them as multiples of B, the logits' bytes.

The kernels run in Triton's interpreter, where each active lane of a load or store is counted, as often as it happens;
nothing is timed, and no GPU is needed. What a narrow or strided access moves besides is not seen. What a kernel loads
again comes from the cache, if at all: in brackets it is counted once. Of torch's operations the inputs and outputs are
counted, once each, which is the least that their kernels can move. Liger's kernels are counted as ours, if it is there
(requirements/bench.txt). Each contender is checked against PyTorch first.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    for folder in ("kernels", "tests", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from bench import contenders, pretend
from bench.cases import DTYPES, Case, inputs
from bench.contenders import Contender, Unavailable, Unsupported
from bench.correctness import check
from bench.work import Work


@dataclass
class Launch:
    kernel: str
    loaded: dict[str, int] = field(default_factory=dict)  # bytes, by the name of the kernel's argument
    touched: dict[str, int] = field(default_factory=dict)  # of them those loaded for the first time: from memory
    stored: dict[str, int] = field(default_factory=dict)

    def moved(self, again: bool) -> int:
        """Bytes loaded and stored; `again`: however often one is loaded."""
        return sum((self.loaded if again else self.touched).values()) + sum(self.stored.values())


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

    def __init__(self) -> None:
        super().__init__()
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
            self.bytes += sum(sizes.values())
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


def moved_by(contender: Contender, case: Case, on_gpu: bool) -> str:
    """B that its kernels and operations access, and of these what comes from memory or goes there; or why not."""
    try:
        with pretend.gpu() if on_gpu else contextlib.nullcontext():
            work = Work(contender, case)
            made = inputs(case, torch.device("cpu"), seed=0)
            wrong = check({"it": work}, case, made, [1])["it"]
            if isinstance(wrong, str):
                return wrong
            with Operations() as operations, counted() as launches:
                work.run(made)
    except Unsupported:
        return "-"
    accessed, from_memory = (
        operations.bytes + sum(launch.moved(again) for launch in launches) for again in (True, False)
    )
    return f"{accessed / case.matrix_bytes:.2f} ({from_memory / case.matrix_bytes:.2f})"


SHAPES = (512, 10), (64, 100), (32, 1000), (8, 32000), (4, 50257), (4, 128256), (2, 262144)
KINDS = (
    ("cross_entropy", "step", "mean"),
    ("cross_entropy", "step", "scaled"),
    ("cross_entropy", "step", "soft"),
    ("cross_entropy", "forward", "mean"),
    ("softmax", "forward", "mean"),
    ("softmax", "step", "mean"),
)


def contenders_here() -> Iterator[tuple[str, Contender, bool]]:
    """Name, contender, and whether its host code wants a GPU."""
    for name in ("softxent", "softxent-inplace", "eager"):
        yield name, contenders.load(name, "cpu"), False
    try:
        with pretend.gpu():
            yield "liger", contenders.load("liger", "cuda"), True
    except Unavailable as error:
        print(f"liger: {error}\n", file=sys.stderr)


def main() -> None:
    import triton

    import interpreter
    from softxent import dispatch

    interpreter.install()
    dispatch.INTERPRET = True
    print("Made by `python bench/traffic.py`.\n")
    print(f"torch {torch.__version__}, triton {triton.__version__}, in Triton's interpreter. Multiples of the logits' "
          "bytes: accessed, and in brackets from memory or to it.")  # fmt: skip
    compared = list(contenders_here())
    for op, mode, kind in KINDS:
        print(f"\n## {op} {mode}, {kind}\n")
        print(row("rows x width", "dtype", "least", *(f"{name} {one.version}" for name, one, _ in compared)))
        print("|---|---|" + "---:|" * (1 + len(compared)))
        for n_rows, n_cols in SHAPES:
            for dtype in DTYPES:
                case = Case(op, n_rows, n_cols, dtype, mode, kind)
                cells = (moved_by(one, case, on_gpu) for _, one, on_gpu in compared)
                least = f"{case.least_bytes / case.matrix_bytes:.2f}"
                print(row(f"{n_rows} x {n_cols}", dtype, least, *cells), flush=True)


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


if __name__ == "__main__":
    main()
