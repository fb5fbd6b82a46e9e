"""The work that contenders are given: shapes, dtypes, modes; their inputs; and the least bytes that each must move."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

WIDTHS = (2, 10, 32, 64, 100, 1000, 4096, 32000, 50257, 65537, 128256, 151936, 262144)
CPU_WIDTHS = (10, 100, 1000, 32000)
SOME = (1000, 32000, 128256)  # of the columns: for options
SMALL = ((256, 10), (1024, 1000))  # rows, columns: a step of Fashion-MNIST, and of ImageNet
DTYPES = ("bfloat16", "float32")
MODES = ("forward", "step")
KINDS = ("mean", "scaled", "smoothing", "soft", "ignored")
SMOOTHING = 0.1
SCALE = 0.5  # of a scaled loss
IGNORE_INDEX = -100


class Case(NamedTuple):
    """One piece of work, the same for every contender.

    mode   forward    without autograd
           step       forward and backward
    kind   mean       the mean loss; the gradient that comes in is 1
           scaled     it is SCALE, known only in backward
           smoothing  of the labels, by SMOOTHING
           soft       targets are probabilities, of the logits' dtype
           ignored    every second target is IGNORE_INDEX
    Of softmax there is one kind, "mean"; a matrix of gradients comes in.
    """

    op: str
    n_rows: int
    n_cols: int
    dtype: str
    mode: str
    kind: str = "mean"

    def __str__(self) -> str:
        return f"{self.op} {self.mode} {self.n_rows} x {self.n_cols} {self.dtype} {self.kind}"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def matrix_bytes(self) -> int:
        """B: the logits."""
        return self.n_rows * self.n_cols * self.torch_dtype.itemsize

    @property
    def least_bytes(self) -> int:
        """What has to be read or written, however it is done: each input once, and each output once.

        cross_entropy   forward    logits + targets                           logits of ignored rows are not read
                        step       logits + targets + gradient                scaled: + logits again
        softmax         forward    logits + probabilities
                        step       the same, and probabilities + incoming gradient + gradient
        Targets are 8 bytes a row, or a matrix of probabilities; the loss is one number.
        """
        matrix = self.matrix_bytes
        if self.op == "softmax":
            return matrix * {"forward": 2, "step": 5}[self.mode]
        read = matrix // 2 if self.kind == "ignored" else matrix
        targets = matrix if self.kind == "soft" else 8 * self.n_rows
        again = read if self.kind == "scaled" and self.mode == "step" else 0
        return read + targets + again + (0 if self.mode == "forward" else matrix)


class Inputs(NamedTuple):
    logits: Tensor  # [n_rows, n_cols], a leaf
    target: Tensor  # [n_rows] int64, or [n_rows, n_cols]
    gradient: Tensor  # that comes in: [] of the logits' dtype, or [n_rows, n_cols]


def inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    shape = case.n_rows, case.n_cols
    logits = torch.empty(shape, dtype=case.torch_dtype, device=device)
    if case.kind == "soft":
        target = torch.empty_like(logits)
    else:
        target = torch.empty(case.n_rows, dtype=torch.int64, device=device)
    gradient = torch.empty(shape if case.op == "softmax" else (), dtype=case.torch_dtype, device=device)
    made = Inputs(logits.requires_grad_(case.mode != "forward"), target, gradient)
    refill(made, case, seed)
    return made


@torch.no_grad()
def refill(made: Inputs, case: Case, seed: int) -> None:
    """Other values in the same memory, so that whoever remembers a result by its address is found out."""
    generator = torch.Generator(made.logits.device).manual_seed(seed)
    made.logits.normal_(generator=generator).mul_(3)
    if case.kind == "soft":
        made.target.uniform_(generator=generator)
        made.target.div_(made.target.sum(1, keepdim=True))
    else:
        made.target.random_(case.n_cols, generator=generator)
        if case.kind == "ignored":
            made.target[::2] = IGNORE_INDEX
    if case.op == "softmax":
        made.gradient.normal_(generator=generator)
    else:
        made.gradient.fill_(SCALE if case.kind == "scaled" else 1.0)


MOST_ROWS = 1 << 24  # of the narrowest: PyTorch's mean loss goes through the rows in one block


def rows_of(n_cols: int, dtype: str, matrix_bytes: int) -> int:
    """As many rows as make up about so many bytes, up to MOST_ROWS."""
    itemsize: int = getattr(torch, dtype).itemsize
    return min(MOST_ROWS, math.ceil(matrix_bytes / (n_cols * itemsize)))


def sweep(matrix_bytes: int, widths: tuple[int, ...] = WIDTHS, dtypes: tuple[str, ...] = DTYPES) -> Iterator[Case]:
    """Every width with about as many bytes; what matters most comes first, with the small shapes."""
    some = [n_cols for n_cols in widths if n_cols in SOME] or widths

    def cases(op: str, mode: str, dtype: str, kind: str, which: Iterable[int]) -> Iterator[Case]:
        for n_cols in which:
            yield Case(op, rows_of(n_cols, dtype, matrix_bytes), n_cols, dtype, mode, kind)

    for mode in ("step", "forward"):
        for dtype in dtypes:
            yield from cases("cross_entropy", mode, dtype, "mean", widths)
            for n_rows, n_cols in SMALL:
                if n_cols in widths:
                    yield Case("cross_entropy", n_rows, n_cols, dtype, mode)
    for dtype in dtypes:
        for kind in KINDS[1:]:
            yield from cases("cross_entropy", "step", dtype, kind, some)
        for mode in MODES:
            yield from cases("softmax", mode, dtype, "mean", [n for n in widths if n <= 65536])
