# mypy: disable-error-code="no-untyped-def"
"""The kernel of tutorial_softmax: persistent programs, each with every so manieth row, padded to a power of two."""

import triton
import triton.language as tl


@triton.jit
def softmax_kernel(
    out_ptr, logits_ptr, out_stride, logits_stride, n_rows, n_cols, BLOCK: tl.constexpr, STAGES: tl.constexpr
):
    columns = tl.arange(0, BLOCK)
    inside = columns < n_cols
    for row in tl.range(tl.program_id(0), n_rows, tl.num_programs(0), num_stages=STAGES):
        z = tl.load(logits_ptr + row * tl.cast(logits_stride, tl.int64) + columns, mask=inside, other=-float("inf"))
        e = tl.exp(z.to(tl.float32) - tl.max(z.to(tl.float32), 0))
        tl.store(out_ptr + row * tl.cast(out_stride, tl.int64) + columns, e / tl.sum(e, 0), mask=inside)
