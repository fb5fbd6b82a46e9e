"""Rows of more than launch.NARROW columns, one a program: loss, stats and gradients. common.py has the formula.

    1  Each thread goes through its columns, with a running maximum and sums that move with it (Milakov and Gimelshein,
       2018, "Online normalizer calculation for softmax").
    2  The threads' sums become the row's: its loss, its stats, and the factors of its gradients.
    3  Each thread goes through its columns again and writes the gradients. Forward alone ends before.

A chunk is UNROLL granules of 16 bytes a thread. The row's first HELD chunks stay in registers from 1 to 3, the others
are read again: from the cache, as long as the rows in flight fit there.

The target row enters as `hard` at the target class, if there is one, and share * u_j at each column:

    u_j = w_j                                      share = eps / n_cols       class indices; left out if eps is None
    u_j = w_j * ((1 - eps) * t_j + eps / n_cols)   share = 1                  probabilities

An odd row starts and ends within a granule. Its columns are counted from the granule's start: the row is [low, high),
its whole granules [first, last), and the ends are accessed value by value, one a thread.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

import triton
import triton.language as tl

from .common import (
    behind,
    better_of,
    exp,
    exp_for,
    finite_or_zero,
    gradient_of_row,
    load_factor,
    load_sample_weight,
    load_target,
    logit_map,
    loss_of_target,
    moment_of,
    nan_unless,
    raised,
    rows_that_count,
    smoothing,
    store_stats,
    times_slope,
    weighed_gap,
)
from .handles import cached_launch

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def start_of(ptr, offset, GRANULE: tl.constexpr):
    """ptr + offset; GRANULE > 1 says that it is a multiple of so many values."""
    ptr += offset
    if GRANULE > 1:
        ptr = tl.multiple_of(ptr, GRANULE * ptr.dtype.element_ty.primitive_bitwidth // 8)
    return ptr


@triton.jit
def by_thread(values, THREADS: tl.constexpr):
    """[UNROLL, THREADS, GRANULE] of a chunk [UNROLL, THREADS * GRANULE]: the second is how neighbours are accessed, and
    leaves Triton no choice of who holds what; of the first each thread sums what it holds."""
    return tl.reshape(values, [values.shape[0], THREADS, values.shape[1] // THREADS])


@triton.jit
def inside(at, low, high, ODD: tl.constexpr):
    """Which columns are in [low, high); low is 0 but for odd rows."""
    mask = at < high
    if ODD:
        mask = (at >= low) & mask
    return mask


@triton.jit
def load_chunk(
    ptr,
    stride,
    at,
    low,
    high,
    other: tl.constexpr,
    EVICT: tl.constexpr,
    THREADS: tl.constexpr,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
):
    """Values at the columns `at`, by thread; `other` where they are not in [low, high)."""
    mask = inside(at, low, high, ODD)
    if GRANULE == 1:
        at = at.to(tl.int64) * stride
    return by_thread(tl.load(ptr + at, mask=mask, other=other, eviction_policy=EVICT), THREADS)


@triton.jit
def store_chunk(ptr, values, at, low, high, ODD: tl.constexpr):
    values = tl.reshape(values.to(ptr.dtype.element_ty), at.shape)
    tl.store(ptr + at, values, mask=inside(at, low, high, ODD), eviction_policy="evict_first")


@triton.jit
def coefficients(t, at, low, high, formula, SOFT: tl.constexpr):
    """u_j of the columns in [low, high), in the shape and dtype of t."""
    weight_ptr, eps, even, extras = formula
    u = tl.full(t.shape, 1.0, t.dtype)
    if weight_ptr is not None:
        w = tl.load(weight_ptr + at, mask=(at >= low) & (at < high), other=0.0)
        u = by_thread(w, t.shape[1]).to(t.dtype)
    if SOFT:
        if extras.label_smoothing is not None:
            t = (1.0 - eps) * t + even
        u *= t
    return u


@triton.jit
def add_chunk(
    sums,  # of each thread [THREADS]
    x,
    t,
    at,
    start,
    low,
    high,
    at_y,
    formula,
    CHUNK: tl.constexpr,
    SOFT: tl.constexpr,
    U: tl.constexpr,
    MOMENT: tl.constexpr,
    BEST: tl.constexpr,
):
    """The sums and those of a chunk, relative to the maximum of both: of [low, high) but the target class."""
    m, rest, below, moment, total, gap, best = sums
    extras = formula[3]
    z, _ = logit_map(x, None, extras, m.dtype)
    u = z
    if U:
        u = coefficients(t.to(m.dtype), at, low, high, formula, SOFT)
    at = by_thread(at, z.shape[1])
    if (start < low) | (start + CHUNK > high) | ((at_y >= start) & (at_y < start + CHUNK)):
        counts = (at >= low) & (at < high) & (at != at_y)
        z = tl.where(counts, z, float("-inf"))
        u = tl.where(counts, u, 0.0)
    highest = tl.max(tl.max(z, 2), 0)
    if BEST:
        hit = tl.min(tl.min(tl.where(z == highest[None, :, None], at, NOWHERE), 2), 0)
        best = tl.where(highest > m, hit, tl.where(highest == m, tl.minimum(hit, best), best))
    highest = tl.maximum(m, highest)
    shift = finite_or_zero(highest)
    less = exp_for(m - shift, x.dtype)
    risen = tl.where(m == float("-inf"), 0.0, highest - m)
    e = exp_for(z - shift[None, :, None], x.dtype)
    if MOMENT:
        moment = less * (moment + risen * rest)
        moment += tl.sum(tl.sum(moment_of(e, shift[None, :, None] - z), 2), 0)
        below = tl.where(highest > m, less * rest, below)
        below += tl.sum(tl.sum(tl.where(z == highest[None, :, None], 0.0, e), 2), 0)
    rest = rest * less + tl.sum(tl.sum(e, 2), 0)
    if U:
        gap += raised(total, risen) + tl.sum(tl.sum(weighed_gap(shift[None, :, None], z, u), 2), 0)
        total += tl.sum(tl.sum(u, 2), 0)
    return highest, rest, below, moment, total, gap, best


@triton.jit
def sums_of_row(sums):
    """The row's sums, from those of its threads. Their products are rounded before lanes exchange them, which is what
    fma with 0 says: fused into the first exchange they would leave lanes of a warp with sums a bit apart."""
    m, rest, below, moment, total, gap, best = sums
    highest = tl.max(m, 0)
    less = exp(m - finite_or_zero(highest))
    risen = tl.where(m == float("-inf"), 0.0, highest - m)
    moment = tl.sum(tl.fma(less, moment + risen * rest, 0.0), 0)
    rest = tl.fma(less, rest, 0.0)
    below = tl.sum(tl.where(m == highest, below, rest), 0)
    rest = tl.sum(rest, 0)
    gap = tl.sum(gap + raised(total, risen), 0)
    best = tl.min(tl.where(m == highest, best, NOWHERE), 0)
    return highest, rest, below, moment, tl.sum(total, 0), gap, best


@triton.jit
def write_chunk(
    out,  # dlogits_ptr, dtarget_ptr, and where the row starts in each
    x,
    t,
    at,
    low,
    high,
    factors,  # m, log_d, and what makes its gradients
    formula,
    cotangents,
    GRANULE: tl.constexpr,
    ODD: tl.constexpr,
    SOFT: tl.constexpr,
    U: tl.constexpr,
):
    """The gradients at columns in [low, high), as if none of them were the target class."""
    dlogits_ptr, dtarget_ptr, starts = out
    m, log_d, scale, bend, smooth, of_t = factors
    extras = formula[3]
    z, slope = logit_map(x, None, extras, m.dtype)
    if dlogits_ptr is not None:
        e = exp_for(z - m, x.dtype)
        dz = scale * e
        if cotangents.entropy is not None:
            dz += bend * moment_of(e, m - z)
        if U:
            u = coefficients(t.to(m.dtype), at, low, high, formula, SOFT)
            dz -= tl.where(smooth == 0.0, 0.0, smooth * u)
        dz = times_slope(dz, slope, extras)
        store_chunk(start_of(dlogits_ptr, starts[0], GRANULE), dz, at, low, high, ODD)
    if dtarget_ptr is not None:
        dt = of_t * (log_d + (m - z))
        if formula[0] is not None:
            dt *= coefficients(z, at, low, high, formula, False)
        dt = tl.where(of_t == 0.0, 0.0, dt)
        store_chunk(start_of(dtarget_ptr, starts[1], GRANULE), dt, at, low, high, ODD)


@cached_launch
@triton.jit
def wide_row_kernel(
    logits_ptr,  # [n_rows, n_cols]
    target_ptr,  # [n_rows] int, or [n_rows, n_cols] floating point, or None: c = 0
    weight_ptr,  # [n_cols], or None: all 1
    sample_weight_ptr,  # [n_rows], or None: all 1
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents
    extras,  # Extras
    outputs,  # Outputs
    dlogits_ptr,  # [n_rows, n_cols] out, or None; rows lie in granules as those of the logits do
    dtarget_ptr,  # likewise, of probabilities
    n_cols,
    strides,  # Strides
    ignore_index,
    NORMS: tl.constexpr,
    HELD: tl.constexpr,  # chunks
    UNROLL: tl.constexpr,
    THREADS: tl.constexpr,
    GRANULE: tl.constexpr,  # values in 16 bytes of logits; 1 if they do not lie side by side
    GIVEN: tl.constexpr,  # GRANULE, if the probabilities lie in granules as the logits do, or 1
    ODD: tl.constexpr,  # whether rows start and end within a granule
):
    dtype: tl.constexpr = logits_ptr.dtype.element_ty
    acc: tl.constexpr = tl.float64 if dtype == tl.float64 else tl.float32
    if target_ptr is None:
        CLASS: tl.constexpr = False
        SOFT: tl.constexpr = False
    else:
        CLASS: tl.constexpr = target_ptr.dtype.element_ty.is_int()
        SOFT: tl.constexpr = target_ptr.dtype.element_ty.is_floating()
    U: tl.constexpr = SOFT or extras.label_smoothing is not None
    MOMENT: tl.constexpr = outputs.entropy is not None or cotangents.entropy is not None
    BEST: tl.constexpr = outputs.prediction is not None
    WRITES: tl.constexpr = dlogits_ptr is not None or dtarget_ptr is not None
    FIRST: tl.constexpr = "evict_last" if WRITES else "evict_first"
    INF: tl.constexpr = float("-inf")
    CHUNK: tl.constexpr = THREADS * UNROLL * GRANULE
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)

    # where the row lies
    low, first = 0, 0
    if ODD:
        low = ((logits_ptr + row * strides.row).to(tl.int64) // (16 // GRANULE) % GRANULE).to(tl.int32)
        first = (low + GRANULE - 1) // GRANULE * GRANULE
    high = low + n_cols
    last = high // GRANULE * GRANULE  # as a multiple: what Triton has to know to access granules at once
    x_ptr = start_of(logits_ptr, row * strides.row - low, GRANULE)
    starts = row * strides.dlogits_row - low, row * strides.dtarget_row - low
    if weight_ptr is not None:
        weight_ptr -= low
    lane = tl.arange(0, UNROLL)[:, None] * (THREADS * GRANULE) + tl.arange(0, THREADS * GRANULE)[None, :]
    ends = tl.arange(0, THREADS)[None, :]
    if ODD:
        ends = tl.where(ends < GRANULE, ends, last + ends - GRANULE)
        is_end = (ends < first) | (ends >= last)
        ends = tl.where(is_end & (ends >= low) & (ends < high), ends, NOWHERE)

    # what it is compared with
    eps, even = smoothing(extras, n_cols, acc)
    formula = weight_ptr, eps, even, extras
    share = even
    t_ptr = x_ptr
    if CLASS:
        target, active, valid = load_target(target_ptr, sample_weight_ptr, row, n_rows, n_cols, ignore_index)
        at_y = target + low
        x_y = tl.load(x_ptr + at_y.to(tl.int64) * strides.col, mask=valid, other=0.0)
        z_y, slope_y = logit_map(x_y, None, extras, acc)
        w_y = tl.full((), 1.0, acc)
        if weight_ptr is not None:
            w_y = tl.load(weight_ptr + at_y, mask=valid, other=1.0).to(acc)
        w_y += nan_unless(valid, acc)
        v = w_y
    else:
        active = rows_that_count(sample_weight_ptr, row, n_rows)
        target, valid = tl.full((), -1, tl.int32), active
        at_y = target
        z_y, slope_y = tl.full((), INF, acc), tl.full((), 1.0, acc)
        w_y, v = tl.zeros((), acc), tl.full((), 1.0, acc)
        if SOFT:
            share = v
            t_ptr = start_of(target_ptr, row * strides.target_row - low * strides.target_col, GIVEN)
    # a row that does not count is not read
    until = tl.where(active, last, 0) // GRANULE * GRANULE
    until_end = tl.where(active, high, 0)

    # 1
    zero = tl.zeros([THREADS], acc)
    sums = zero + INF, zero, zero, zero, zero, zero, tl.full([THREADS], NOWHERE, tl.int32)
    held = ()
    for k in tl.static_range(HELD):
        x = load_chunk(x_ptr, strides.col, k * CHUNK + lane, first, until, INF, "evict_first", THREADS, GRANULE, ODD)
        held = held + (x,)  # noqa: RUF005
    for k in tl.static_range(HELD):
        at = k * CHUNK + lane
        t = held[k]
        if SOFT:
            t = load_chunk(t_ptr, strides.target_col, at, first, until, 0.0, FIRST, THREADS, GIVEN, ODD)
        sums = add_chunk(sums, held[k], t, at, k * CHUNK, first, until, at_y, formula, CHUNK, SOFT, U, MOMENT, BEST)
    m, rest, below, moment, total, gap, best = sums
    for start in range(HELD * CHUNK, until, CHUNK):
        at = start + lane
        x = load_chunk(x_ptr, strides.col, at, first, until, INF, FIRST, THREADS, GRANULE, ODD)
        t = x
        if SOFT:
            t = load_chunk(t_ptr, strides.target_col, at, first, until, 0.0, FIRST, THREADS, GIVEN, ODD)
        sums = m, rest, below, moment, total, gap, best
        m, rest, below, moment, total, gap, best = add_chunk(
            sums, x, t, at, start, first, until, at_y, formula, CHUNK, SOFT, U, MOMENT, BEST
        )
    sums = m, rest, below, moment, total, gap, best
    x_end = zero[None, :, None]
    t_end = x_end
    if ODD:
        x_end = load_chunk(x_ptr, 1, ends, low, until_end, INF, "evict_first", THREADS, 1, ODD)
        if SOFT:
            t_end = load_chunk(t_ptr, strides.target_col, ends, low, until_end, 0.0, "evict_first", THREADS, 1, ODD)
        sums = add_chunk(sums, x_end, t_end, ends, -1, low, until_end, at_y, formula, 0, SOFT, U, MOMENT, BEST)

    # 2
    runner_up, rest, below, moment, total, gap, best = sums_of_row(sums)
    if MOMENT:  # beside the 1 of a largest that is alone, the others would have lost digits
        rest = tl.where((rest >= 1.0) & (rest < 2.0), 1.0 + below, rest)
    m = tl.where(active, tl.maximum(runner_up, z_y), 0.0)
    risen = tl.where(runner_up == INF, 0.0, m - runner_up)
    over = exp(runner_up - m)
    moment = moment_of(over, moment + rest * risen) + moment_of(exp(z_y - m), behind(m, z_y))
    rest *= over
    gap += raised(total, risen) + weighed_gap(m, z_y, w_y)
    total += w_y
    d, log_d, loss = loss_of_target(m, rest, z_y, w_y, v, eps, extras)
    if U:
        loss += share * (total * log_d + gap)
    loss = tl.where(active, loss * load_sample_weight(sample_weight_ptr, row, active, acc), 0.0)
    if outputs.loss is not None:
        tl.store(outputs.loss + row, loss.to(outputs.loss.dtype.element_ty))
    best = better_of(z_y, target, runner_up, best - low)
    store_stats(outputs, row, row < n_rows, active, valid, m, d, log_d, z_y, below, moment, best)

    # 3
    if WRITES:
        r = load_factor(cotangents, strides.dloss, norm_ptr, sample_weight_ptr, row, active, NORMS, acc)
        scale, bend, smooth, at_target = gradient_of_row(
            r, m, rest, z_y, w_y, v, total, moment, eps, share, extras, cotangents, row, active, U
        )
        factors = m, log_d, scale, bend, smooth, tl.where(active, r * (1.0 - eps), 0.0)
        out = dlogits_ptr, dtarget_ptr, starts
        for k in tl.static_range(HELD):
            at = k * CHUNK + lane
            t = held[k]
            if SOFT:
                t = load_chunk(t_ptr, strides.target_col, at, first, until, 0.0, "evict_first", THREADS, GIVEN, ODD)
            write_chunk(out, held[k], t, at, first, last, factors, formula, cotangents, GRANULE, ODD, SOFT, U)
        for start in range(HELD * CHUNK, last, CHUNK):
            at = start + lane
            x = load_chunk(x_ptr, strides.col, at, first, until, INF, "evict_first", THREADS, GRANULE, ODD)
            t = x
            if SOFT:
                t = load_chunk(t_ptr, strides.target_col, at, first, until, 0.0, "evict_first", THREADS, GIVEN, ODD)
            write_chunk(out, x, t, at, first, last, factors, formula, cotangents, GRANULE, ODD, SOFT, U)
        if ODD:
            write_chunk(out, x_end, t_end, ends, low, high, factors, formula, cotangents, 1, ODD, SOFT, U)
        if CLASS:
            if dlogits_ptr is not None:
                tl.debug_barrier()  # the target's value goes over what another thread may have written there
                at_target = times_slope(at_target, slope_y, extras).to(dlogits_ptr.dtype.element_ty)
                tl.store(dlogits_ptr + starts[0] + at_y, at_target, mask=valid)
