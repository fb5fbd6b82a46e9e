"""The mean over rows, without the host knowing how many count, and its gradient: three small kernels.

norm_kernel     ahead of the rows: parts of what the mean divides by, the sum of w_y over the targets that count
reduce_kernel   after them: the sum of the losses, divided by it; of many in two launches
scale_kernel    in backward: the gradient times the incoming one; nothing at all where that is 1
"""

import triton
import triton.language as tl

from .arithmetic import divide
from .formula import load_norm, load_target, load_target_weight
from .handles import cached_launch


@cached_launch
@triton.jit
def norm_kernel(
    target_ptr,  # [n_rows] int
    weight_ptr,  # [n_cols], or None: all 1
    norm_ptr,  # [programs] out
    n_rows,
    n_cols,
    ignore_index,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = norm_ptr.dtype.element_ty
    norm = tl.zeros([BLOCK], acc)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, n_rows, tl.num_programs(0) * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        target, active, valid = load_target(target_ptr, None, rows, n_rows, n_cols, ignore_index)
        norm += tl.where(active, load_target_weight(weight_ptr, target, valid, acc), 0.0)
    tl.store(norm_ptr + tl.program_id(0), tl.sum(norm, 0))


@cached_launch
@triton.jit
def reduce_kernel(
    loss_ptr,  # [n] losses, or sums of some
    norm_ptr,  # [NORMS] parts of the mean's divisor; it itself, or a number, with NORMS = 0; or None: a sum
    out_ptr,  # [programs] out: parts of the sum, or all of it
    n,
    NORMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    acc: tl.constexpr = loss_ptr.dtype.element_ty
    loss = tl.zeros([BLOCK], acc)
    for start in range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        loss += tl.load(loss_ptr + at, mask=at < n, other=0.0)
    loss = tl.sum(loss, 0)
    if norm_ptr is not None:
        loss = divide(loss, load_norm(norm_ptr, NORMS, acc))
    tl.store(out_ptr + tl.program_id(0), loss.to(out_ptr.dtype.element_ty))


@triton.jit
def scaled(x, factor):
    """Ignored rows stay 0, whatever the factor."""
    y = x.to(factor.dtype)
    return tl.where(y == 0.0, y, y * factor).to(x.dtype)


@cached_launch
@triton.jit
def scale_kernel(
    values_ptr,  # [n_rows, n_cols] in and out
    factor_ptr,  # []
    n_rows,
    n_cols,
    stride_row,
    DOUBLE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,  # whether rows start at multiples of 16 bytes
):
    acc: tl.constexpr = tl.float64 if DOUBLE else tl.float32
    factor = tl.load(factor_ptr).to(acc)
    n_cols = n_cols + tl.zeros((), tl.int64)  # so near to 2^31 that rounding up to a block would wrap
    if factor != 1.0:
        blocks = tl.cdiv(n_cols, BLOCK)
        for i in range(tl.program_id(0), n_rows * blocks, tl.num_programs(0)):
            start = i % blocks * BLOCK
            at = tl.arange(0, BLOCK)
            block_ptr = values_ptr + (i // blocks).to(tl.int64) * stride_row + start
            if ALIGNED:
                block_ptr = tl.multiple_of(block_ptr, 16)
            if start + BLOCK <= n_cols:
                tl.store(block_ptr + at, scaled(tl.load(block_ptr + at), factor))
            else:
                mask = start + at < n_cols
                tl.store(block_ptr + at, scaled(tl.load(block_ptr + at, mask=mask, other=0.0), factor), mask=mask)
