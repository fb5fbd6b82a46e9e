"""Right before fast: each contender's loss and gradient against PyTorch's in float64, on inputs it has not seen.

A contender gets no time, but its error, if
    its loss or gradient is off, or has a NaN where the exact one has none;
    it leaves part of its output unwritten: memory is handed out full of NaN where the machine can do that;
    it returns what it returned last time: the same memory is filled with other values and it is asked again;
    it changes its input, unless it says so.
Asked before timing, and on fresh inputs again afterwards.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.cases import IGNORE_INDEX, Case, Inputs, refill
from bench.contenders import options_of
from bench.work import Result, Work, restore

# Of the loss: relative. PyTorch's own, summed by one block in its dtype, is up to 2e-3 off in bfloat16.
LOSS = {torch.float32: 1e-4, torch.bfloat16: 2**-6}
# Of each column of the gradient: the norm of its error over its norm, so that a column left out is found in a wide row.
# In a few rows rounding alone may come near, where a column's values cancel.
COLUMN, ENOUGH_ROWS = 0.5, 16
# Of the gradient, or of probabilities: their largest error over their largest value. PyTorch's own in float32, whose
# sum of a long row drifts, is up to 2e-4 off at 262144 columns; in bfloat16 6e-3.
MATRIX = {torch.float32: 5e-4, torch.bfloat16: 2**-6}
# Values that are worked on in float64 at once: on a CPU as many as its cache holds, on a GPU as keep it busy.
CHUNK = {"cpu": 1 << 18, "cuda": 1 << 24}


class Wrong(Exception):
    """What is wrong with a result."""


@dataclass
class Exact:
    out: Tensor  # the loss [], or probabilities [n_rows, n_cols]; float64
    gradient: Tensor | None  # [n_rows, n_cols] float64


def exact(case: Case, inputs: Inputs) -> Exact:
    """By PyTorch in float64, some rows at a time."""
    logits, target = inputs.logits.detach(), inputs.target
    rows = max(1, CHUNK[logits.device.type] // case.n_cols)
    wants_gradient = case.mode != "forward"
    gradient = torch.empty_like(logits, dtype=torch.float64) if wants_gradient else None
    divisor = int((target != IGNORE_INDEX).sum()) if target.dim() == 1 else case.n_rows
    total = torch.zeros((), dtype=torch.float64, device=logits.device)
    matrix = torch.empty_like(logits, dtype=torch.float64) if case.op == "softmax" else None
    for start in range(0, case.n_rows, rows):
        part = slice(start, start + rows)
        chunk = logits[part].double().requires_grad_(wants_gradient)
        if matrix is not None:
            out = chunk.softmax(1)
            matrix[part] = out.detach()
            incoming = inputs.gradient[part].double()
        else:
            labels = target[part] if target.dim() == 1 else target[part].double()
            out = F.cross_entropy(chunk, labels, reduction="sum", **options_of(case)) / divisor
            total += out.detach()
            incoming = inputs.gradient.double()
        if gradient is not None:
            (gradient[part],) = torch.autograd.grad(out, chunk, incoming)
    return Exact(total if matrix is None else matrix, gradient)


def compare(case: Case, result: Result, right: Exact) -> dict[str, float]:
    """The errors, {"loss" or "probabilities": ..., "gradient": ...}. Raises Wrong where one is too large."""
    out, gradient = result
    found = {}
    if case.op == "softmax":
        found["probabilities"] = largest_error("the probabilities", out, right.out, MATRIX[case.torch_dtype])
    else:
        found["loss"] = float((out.double() - right.out).abs() / right.out.abs().clamp_min(1e-300))
        if not found["loss"] <= LOSS[case.torch_dtype]:
            raise Wrong(f"the loss is {out.item():.6g} where {right.out.item():.6g} is right")
    if right.gradient is not None:
        assert gradient is not None
        found["gradient"] = largest_error("the gradient", gradient, right.gradient, MATRIX[case.torch_dtype])
    return found


def largest_error(name: str, given: Tensor, right: Tensor, tolerance: float) -> float:
    """The largest error over the largest value. Raises Wrong above the tolerance."""
    if given.shape != right.shape:
        raise Wrong(f"{name} has shape {tuple(given.shape)}, not {tuple(right.shape)}")
    rows = max(1, CHUNK[right.device.type] // right.shape[1])
    scale = max(float(part.abs().max()) for part in right.split(rows))
    worst = 0.0
    norms = torch.zeros(2, right.shape[1], dtype=torch.float64, device=right.device)  # of the error, and of the column
    for start, (part, exact_part) in enumerate(zip(given.split(rows), right.split(rows), strict=True)):
        off = (part.double() - exact_part).abs()
        largest = float(off.max())  # NaN if one is
        if not largest <= tolerance * scale:
            where = int(torch.where(off.isnan(), torch.inf, off).argmax())
            row, col = divmod(where, right.shape[1])
            value, exact_value = float(part[row, col]), float(exact_part[row, col])
            raise Wrong(f"{name} at [{start * rows + row}, {col}] is {value:.6g} where {exact_value:.6g} is right")
        worst = max(worst, largest / scale if scale else 0.0)
        norms += torch.stack((off.square().sum(0), exact_part.square().sum(0)))
    bad = norms[0].sqrt() > COLUMN * norms[1].sqrt() + 1e-30
    if len(right) >= ENOUGH_ROWS and bool(bad.any()):
        col = int(bad.nonzero()[0, 0])
        raise Wrong(f"{name} in column {col} is off by {float((norms[0] / norms[1]).sqrt()[col]):.2g} of its norm")
    return worst


def check(
    works: dict[str, Work],
    case: Case,
    inputs: Inputs,
    seeds: list[int],
    after: Callable[[str], None] = lambda _: None,  # each contender's call, which may have taken the device along
) -> dict[str, dict[str, float] | str]:
    """By contender: its errors, the largest over the seeds, or in words what is wrong."""
    found: dict[str, dict[str, float] | str] = {}
    for seed in seeds:
        refill(inputs, case, seed)
        given = Inputs(*(tensor.detach().clone() for tensor in inputs))
        right = exact(case, inputs)
        for name, work in works.items():
            if isinstance(found.get(name), str):
                continue
            try:
                poison(inputs.logits)
                errors = compare(case, work.run(inputs), right)
                untouched(work, inputs, given)
            except Wrong as error:
                found[name] = str(error)
            except Exception as error:  # the contender's own; the others go on
                found[name] = in_words(error)
                after(name)
            else:
                before: Any = found.get(name, {})
                found[name] = {key: max(value, before.get(key, 0.0)) for key, value in errors.items()}
            restore(inputs, given.logits)
            if isinstance(found[name], str):
                refill(inputs, case, seed)  # whatever it did to the other inputs
    return found


def poison(logits: Tensor) -> None:
    """Memory of the result's size is handed out full of NaN, and not of the last contender's right result."""
    matrices = [torch.full_like(logits, float("nan"), requires_grad=False) for _ in range(3)]
    del matrices


def untouched(work: Work, inputs: Inputs, given: Inputs) -> None:
    for name, tensor, before in zip(Inputs._fields, inputs, given, strict=True):
        if name == "logits" and work.overwrites:
            continue
        if not torch.equal(tensor.detach(), before):
            raise Wrong(f"it wrote over its input: the {name}")


def in_words(error: BaseException) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:200]
