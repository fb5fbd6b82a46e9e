"""softmax and log_softmax, and their gradients: what the loss's kernels compute of rows, and one kernel more.

With p = softmax(z), q = log p, and the loss of z against a row c with the sum a (formula.py),

    p_j  = dlse/dz_j
    q_j  = -dloss/dc_j
    dz_j = dq_j - p_j * sum_k dq_k         = -(a * p_j - c_j) with c = dq: of the logits q, whose softmax is p
    dz_j = p_j * (dp_j - sum_k dp_k p_k)   softmax_backward_kernel
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch
from ..dispatch import on_device_of
from ..options import Inputs, Options
from .formula import Cotangents
from .handles import cached_launch
from .rows import NO_COTANGENTS, NO_OUTPUTS, launch_rows, layout, warp_size

ROWS = Options(reduction="none")


@cached_launch
@triton.jit
def softmax_backward_kernel(
    dp_ptr,  # [n_rows, n_cols]
    p_ptr,  # [n_rows, n_cols] contiguous
    dz_ptr,  # [n_rows, n_cols] out, contiguous
    n_rows,
    n_cols,
    stride_row,  # of dp
    stride_col,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,  # values in an access to p and dz
    GIVEN: tl.constexpr,  # to dp
):
    acc: tl.constexpr = tl.float64 if p_ptr.dtype.element_ty == tl.float64 else tl.float32
    n_cols = n_cols // WIDTH * WIDTH  # what Triton has to know to access as many at once
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    dp_ptr += rows * (stride_row // GIVEN * GIVEN)
    p_ptr += rows * n_cols
    dot = tl.zeros([BLOCK_M, BLOCK_N], acc)
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        mask = (rows < n_rows) & (cols < n_cols)
        at = cols if GIVEN > 1 else cols.to(tl.int64) * stride_col
        dp = tl.load(dp_ptr + at, mask=mask, other=0.0).to(acc)
        dot += dp * tl.load(p_ptr + cols, mask=mask, other=0.0).to(acc)
    dot = tl.sum(dot, 1)[:, None]
    for start in range(0, n_cols, BLOCK_N):
        cols = start + tl.arange(0, BLOCK_N)[None, :]
        mask = (rows < n_rows) & (cols < n_cols)
        at = cols if GIVEN > 1 else cols.to(tl.int64) * stride_col
        dp = tl.load(dp_ptr + at, mask=mask, other=0.0).to(acc)
        p = tl.load(p_ptr + cols, mask=mask, other=0.0).to(acc)
        tl.store(dz_ptr + rows * n_cols + cols, (p * (dp - dot)).to(dz_ptr.dtype.element_ty), mask=mask)


def forward(z: Tensor, log: bool) -> Tensor:
    """softmax of each row of z [n_rows, n_cols], or its logarithm: new, contiguous, in the dtype of z."""
    out = z.new_empty(z.shape)
    with on_device_of(z):
        if log:
            launch_rows(Inputs(z, z), ROWS, -1, NO_COTANGENTS, NO_OUTPUTS, (None, out))
        else:
            launch_rows(Inputs(z, None), ROWS, None, Cotangents(None, 1.0, None, None), NO_OUTPUTS, (out, None))
    return out


def backward(dout: Tensor, out: Tensor, log: bool) -> Tensor:
    """The gradient of z, new and contiguous, from that of `out`, which is `forward`'s result."""
    if not out.is_contiguous() or out.data_ptr() % 16:  # as a saved-tensor hook may have brought it back
        out = out.clone(memory_format=torch.contiguous_format)
    dz = out.new_empty(out.shape)
    with on_device_of(out):
        if log:
            launch_rows(Inputs(out, dout), ROWS, -1, NO_COTANGENTS, NO_OUTPUTS, (dz, None))
        else:
            _softmax_backward(dout, out, dz)
    return dz


def _softmax_backward(dp: Tensor, p: Tensor, dz: Tensor) -> None:
    n_rows, n_cols = p.shape
    tile: dict[str, Any] = launch.softmax_backward(n_cols, warp_size()) | launch.OPTIONS
    softmax_backward_kernel[(launch.cdiv(n_rows, tile["BLOCK_M"]),)](
        dp,
        p,
        dz,
        n_rows,
        n_cols,
        *dp.stride(),
        WIDTH=launch.vector(*layout(p)),
        GIVEN=launch.vector(*layout(dp)),
        **tile,
    )
