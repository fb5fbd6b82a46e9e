"""Rows of more than launch.NARROW columns, one a program: loss, stats and gradients. formula.py has the formula.

    1  sum_row          Each thread goes through its columns, with a running maximum and sums that move with it (Milakov
                        and Gimelshein, 2018, "Online normalizer calculation for softmax"). Then they become the row's.
    2  with_target      The target's own term joins them,
       loss_of_row      of which the loss is made,
       gradient_of_row  and the factors of the gradients.
    3  write_row        Each thread goes through its columns again and writes the gradients. Forward alone ends before.

A chunk is UNROLL granules of 16 bytes a thread. The row's first HELD chunks stay in registers from 1 to 3, the others
are read again: from the cache, as long as the rows in flight fit there.

An odd row starts and ends within a granule. Its columns are counted from the granule's start: the row is [low, high),
its whole granules [first, last), and the ends are accessed value by value, one a thread.
"""

# mypy: disable-error-code="assignment, misc, no-redef, var-annotated"

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .arithmetic import exp, exp_for, finite_or_zero, moment_of, raised
from .formula import (
    Formula,
    better_of,
    gradient_of_row,
    load_factor,
    load_sample_weight,
    logit_map,
    loss_of_row,
    smoothing,
    store_stats,
    target_of,
    times_slope,
    weighed_gap,
    with_target,
)
from .handles import cached_launch

NOWHERE = tl.constexpr(2147483647)
INF = tl.constexpr(float("inf"))


class Place(NamedTuple):
    """Where a row starts, and which columns it has."""

    logits_ptr: Any
    probs_ptr: Any
    dlogits: Any  # offsets
    dtarget: Any
    low: Any
    first: Any
    last: Any
    high: Any
    ends: Any  # [1, THREADS] the columns outside [first, last), or NOWHERE


class Sums(NamedTuple):
    """Of the columns but the target class: of each thread [THREADS], or of the row."""

    m: Any
    rest: Any  # of exp(z_j - m)
    below: Any  # of the same, without the largest
    total: Any  # of u_j
    gap: Any  # of u_j * (m - z_j)
    moment: Any  # of exp(z_j - m) * (m - z_j)
    best: Any  # the first column of m


@triton.jit
def place_of(batch, row, n_cols, strides, tile: tl.constexpr):
    """Where a row lies. A shard of the classes may have fewer columns than a granule, or none."""
    GRANULE: tl.constexpr = tile.GRANULE
    low, first = 0, 0
    if tile.ODD:
        low = ((batch.logits_ptr + row * strides.row).to(tl.int64) // (16 // GRANULE) % GRANULE).to(tl.int32)
        first = (low + GRANULE - 1) // GRANULE * GRANULE
    high = low + n_cols
    last = tl.maximum(high, first) // GRANULE * GRANULE  # as a multiple: what Triton has to know to access granules
    ends = tl.arange(0, tile.THREADS)[None, :]
    if tile.ODD:
        ends = tl.where(ends < GRANULE, ends, tl.maximum(last, GRANULE) + ends - GRANULE)
        is_end = (ends < first) | (ends >= last)
        ends = tl.where(is_end & (ends >= low) & (ends < high), ends, NOWHERE)
    logits_ptr = start_of(batch.logits_ptr, row * strides.row - low, GRANULE)
    probs_ptr = logits_ptr
    if batch.probs_ptr is not None:
        probs_ptr = start_of(batch.probs_ptr, row * strides.target_row - low * strides.target_col, tile.GIVEN)
    dlogits, dtarget = row * strides.dlogits_row - low, row * strides.dtarget_row - low
    return Place(logits_ptr, probs_ptr, dlogits, dtarget, low, first, last, high, ends)


@triton.jit
def start_of(ptr, offset, GRANULE: tl.constexpr):
    """ptr + offset; GRANULE > 1 says that it is a multiple of so many values."""
    ptr += offset
    if GRANULE > 1:
        ptr = tl.multiple_of(ptr, GRANULE * ptr.dtype.element_ty.primitive_bitwidth // 8)
    return ptr


@triton.jit
def columns_of(tile: tl.constexpr):
    """[UNROLL, THREADS * GRANULE] of the first chunk."""
    SIDE: tl.constexpr = tile.THREADS * tile.GRANULE
    return tl.arange(0, tile.UNROLL)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]


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
    ptr, stride, at, low, high, other: tl.constexpr, EVICT: tl.constexpr, WIDTH: tl.constexpr, tile: tl.constexpr
):
    """Values at the columns `at`, by thread; `other` where they are not in [low, high)."""
    mask = inside(at, low, high, tile.ODD)
    if WIDTH == 1:
        at = at.to(tl.int64) * stride
    return by_thread(tl.load(ptr + at, mask=mask, other=other, eviction_policy=EVICT), tile.THREADS)


@triton.jit
def load_logits(place, at, until, strides, EVICT: tl.constexpr, tile: tl.constexpr):
    return load_chunk(place.logits_ptr, strides.col, at, place.first, until, -INF, EVICT, tile.GRANULE, tile)


@triton.jit
def load_given(x, place, at, until, strides, formula, EVICT: tl.constexpr, tile: tl.constexpr):
    """Probabilities; x, which is there already, where there are none."""
    t = x
    if formula.probs_ptr is not None:
        t = load_chunk(place.probs_ptr, strides.target_col, at, place.first, until, 0.0, EVICT, tile.GIVEN, tile)
    return t


@triton.jit
def load_ends(place, active, strides, formula, tile: tl.constexpr):
    """Logits and probabilities, and up to which column."""
    until = tl.where(active, place.high, 0)
    x = load_chunk(place.logits_ptr, 1, place.ends, place.low, until, -INF, "evict_first", 1, tile)
    t = x
    if formula.probs_ptr is not None:
        col = strides.target_col
        t = load_chunk(place.probs_ptr, col, place.ends, place.low, until, 0.0, "evict_first", 1, tile)
    return x, t, until


@triton.jit
def store_chunk(ptr, values, at, low, high, ODD: tl.constexpr):
    values = tl.reshape(values.to(ptr.dtype.element_ty), at.shape)
    tl.store(ptr + at, values, mask=inside(at, low, high, ODD), eviction_policy="evict_first")


@triton.jit
def coefficients(t, place, at, low, high, formula, SOFT: tl.constexpr):
    """u_j of the columns in [low, high), in the shape and dtype of t; w_j if not SOFT."""
    u = tl.full(t.shape, 1.0, t.dtype)
    if formula.weight_ptr is not None:
        w = tl.load(formula.weight_ptr - place.low + at, mask=(at >= low) & (at < high), other=0.0)
        u = by_thread(w, t.shape[1]).to(t.dtype)
    if SOFT:
        if formula.extras.label_smoothing is not None:
            t = (1.0 - formula.eps) * t + formula.even
        u *= t
    return u


@triton.jit
def add_chunk(
    sums, place, x, t, at, start, low, high, y, formula, CHUNK: tl.constexpr, MOMENT: tl.constexpr, BEST: tl.constexpr
):
    """The threads' sums and those of a chunk, relative to the maximum of both: of [low, high) but the target class."""
    U: tl.constexpr = formula.probs_ptr is not None or formula.extras.label_smoothing is not None
    m, rest, below, total, gap, moment, best = sums
    z, _ = logit_map(x, formula.extras, m.dtype)
    u = z
    if U:
        u = coefficients(t.to(m.dtype), place, at, low, high, formula, formula.probs_ptr is not None)
    at_y = y + place.low
    at = by_thread(at, z.shape[1])
    if (start < low) | (start + CHUNK > high) | ((at_y >= start) & (at_y < start + CHUNK)):
        counts = (at >= low) & (at < high) & (at != at_y)
        z = tl.where(counts, z, -INF)
        u = tl.where(counts, u, 0.0)
    highest = tl.max(tl.max(z, 2), 0)
    if BEST:
        hit = tl.min(tl.min(tl.where(z == highest[None, :, None], at, NOWHERE), 2), 0)
        best = tl.where(highest > m, hit, tl.where(highest == m, tl.minimum(hit, best), best))
    highest = tl.maximum(m, highest)
    shift = finite_or_zero(highest)
    less = exp_for(m - shift, x.dtype)
    risen = tl.where(m == -INF, 0.0, highest - m)
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
    return Sums(highest, rest, below, total, gap, moment, best)


@triton.jit
def sums_of_row(sums):
    """The row's sums, from those of its threads. Their products are rounded before lanes exchange them, which is what
    fma with 0 says: fused into the first exchange they would leave lanes of a warp with sums a bit apart."""
    m, rest, below, total, gap, moment, best = sums
    highest = tl.max(m, 0)
    less = exp(m - finite_or_zero(highest))
    risen = tl.where(m == -INF, 0.0, highest - m)
    moment = tl.sum(tl.fma(less, moment + risen * rest, 0.0), 0)
    rest = tl.fma(less, rest, 0.0)
    below = tl.sum(tl.where(m == highest, below, rest), 0)
    rest = tl.sum(rest, 0)
    gap = tl.sum(gap + raised(total, risen), 0)
    best = tl.min(tl.where(m == highest, best, NOWHERE), 0)
    return Sums(highest, rest, below, tl.sum(total, 0), gap, moment, best)


@triton.jit
def sum_row(
    place,
    active,
    y,  # its target class, or -1
    strides,
    formula,
    EVICT: tl.constexpr,  # of what will be read again
    MOMENT: tl.constexpr,
    BEST: tl.constexpr,
    tile: tl.constexpr,
):
    """What is held of a row, and its sums. One that does not count is not read."""
    acc: tl.constexpr = formula.eps.dtype
    THREADS: tl.constexpr = tile.THREADS
    HELD: tl.constexpr = tile.HELD
    CHUNK: tl.constexpr = THREADS * tile.UNROLL * tile.GRANULE
    until = tl.where(active, place.last, 0) // tile.GRANULE * tile.GRANULE
    lane = columns_of(tile)
    zero = tl.zeros([THREADS], acc)
    sums = Sums(zero - INF, zero, zero, zero, zero, zero, tl.full([THREADS], NOWHERE, tl.int32))
    held = ()
    for k in tl.static_range(HELD):
        held = held + (load_logits(place, k * CHUNK + lane, until, strides, "evict_first", tile),)  # noqa: RUF005
    for k in tl.static_range(HELD):
        at = k * CHUNK + lane
        t = load_given(held[k], place, at, until, strides, formula, EVICT, tile)
        sums = add_chunk(sums, place, held[k], t, at, k * CHUNK, place.first, until, y, formula, CHUNK, MOMENT, BEST)
    for start in range(HELD * CHUNK, until, CHUNK):
        at = start + lane
        x = load_logits(place, at, until, strides, EVICT, tile)
        t = load_given(x, place, at, until, strides, formula, EVICT, tile)
        sums = add_chunk(sums, place, x, t, at, start, place.first, until, y, formula, CHUNK, MOMENT, BEST)
    if tile.ODD:
        x, t, until_end = load_ends(place, active, strides, formula, tile)
        sums = add_chunk(sums, place, x, t, place.ends, -1, place.low, until_end, y, formula, 0, MOMENT, BEST)
    return held, sums_of_row(sums)


@triton.jit
def write_chunk(
    batch, place, x, t, at, low, high, factors, formula, BEND: tl.constexpr, WIDTH: tl.constexpr, ODD: tl.constexpr
):
    """The gradients at columns in [low, high), as if none of them were the target class."""
    U: tl.constexpr = formula.probs_ptr is not None or formula.extras.label_smoothing is not None
    m = factors.m
    z, slope = logit_map(x, formula.extras, m.dtype)
    if batch.dlogits_ptr is not None:
        e = exp_for(z - m, x.dtype)
        dz = factors.scale * e
        if BEND:
            dz += factors.bend * moment_of(e, m - z)
        if U:
            u = coefficients(t.to(m.dtype), place, at, low, high, formula, formula.probs_ptr is not None)
            dz -= tl.where(factors.smooth == 0.0, 0.0, factors.smooth * u)
        dz = times_slope(dz, slope, formula.extras)
        store_chunk(start_of(batch.dlogits_ptr, place.dlogits, WIDTH), dz, at, low, high, ODD)
    if batch.dtarget_ptr is not None:
        dt = factors.of_t * (factors.log_d + (m - z))
        if formula.weight_ptr is not None:
            dt *= coefficients(z, place, at, low, high, formula, False)
        dt = tl.where(factors.of_t == 0.0, 0.0, dt)
        store_chunk(start_of(batch.dtarget_ptr, place.dtarget, WIDTH), dt, at, low, high, ODD)


@triton.jit
def write_row(batch, place, held, target, factors, strides, formula, BEND: tl.constexpr, tile: tl.constexpr):
    """The gradients of a row. BEND: whether they have a part of the entropy's. The ends are loaded again: they cost
    registers to hold, and lie in the cache."""
    HELD: tl.constexpr = tile.HELD
    CHUNK: tl.constexpr = tile.THREADS * tile.UNROLL * tile.GRANULE
    ODD: tl.constexpr = tile.ODD
    first, last = place.first, place.last
    until = tl.where(target.active, last, 0) // tile.GRANULE * tile.GRANULE
    lane = columns_of(tile)
    if ODD:
        x_end, t_end, _ = load_ends(place, target.active, strides, formula, tile)
    for k in tl.static_range(HELD):
        at = k * CHUNK + lane
        t = load_given(held[k], place, at, until, strides, formula, "evict_first", tile)
        write_chunk(batch, place, held[k], t, at, first, last, factors, formula, BEND, tile.GRANULE, ODD)
    for start in range(HELD * CHUNK, last, CHUNK):
        at = start + lane
        x = load_logits(place, at, until, strides, "evict_first", tile)
        t = load_given(x, place, at, until, strides, formula, "evict_first", tile)
        write_chunk(batch, place, x, t, at, first, last, factors, formula, BEND, tile.GRANULE, ODD)
    if ODD:
        low, high = place.low, place.high
        write_chunk(batch, place, x_end, t_end, place.ends, low, high, factors, formula, BEND, 1, ODD)
    if batch.target_ptr is not None:
        if batch.dlogits_ptr is not None:
            tl.debug_barrier()  # the target's value goes over what another thread may have written there
            at_target = factors.at_target.to(batch.dlogits_ptr.dtype.element_ty)
            tl.store(batch.dlogits_ptr + place.dlogits + place.low + target.y, at_target, mask=target.valid)


@cached_launch
@triton.jit
def wide_row_kernel(
    batch,  # Batch; the rows of its gradients lie in granules as those of the logits do
    norm_ptr,  # [NORMS] parts of the mean's divisor, or it itself with NORMS = 0, or None: no mean
    cotangents,  # Cotangents
    extras,  # Extras
    outputs,  # Outputs
    n_cols,
    strides,  # Strides
    NORMS: tl.constexpr,
    tile: tl.constexpr,  # launch.Wide
):
    acc: tl.constexpr = tl.float64 if batch.logits_ptr.dtype.element_ty == tl.float64 else tl.float32
    MOMENT: tl.constexpr = outputs.entropy is not None or cotangents.entropy is not None
    BEST: tl.constexpr = outputs.prediction is not None
    WRITES: tl.constexpr = batch.dlogits_ptr is not None or batch.dtarget_ptr is not None
    EVICT: tl.constexpr = "evict_last" if WRITES else "evict_first"
    row = tl.program_id(0).to(tl.int64)
    n_rows = tl.num_programs(0)
    place = place_of(batch, row, n_cols, strides, tile)
    eps, even = smoothing(extras, n_cols, acc)
    formula = Formula(batch.probs_ptr, batch.weight_ptr, eps, even, extras)
    target = target_of(batch, row, n_rows, n_cols, strides, formula)

    held, sums = sum_row(place, target.active, target.y, strides, formula, EVICT, MOMENT, BEST, tile)
    rest = sums.rest
    if MOMENT:  # beside the 1 of a largest that is alone, the others would have lost digits
        rest = tl.where((rest >= 1.0) & (rest < 2.0), 1.0 + sums.below, rest)
    of_row, gap = with_target(sums.m, rest, sums.total, sums.gap, sums.moment, target)
    d, log_d, loss = loss_of_row(of_row, gap, target, formula)
    loss *= load_sample_weight(batch.sample_weight_ptr, row, target.active, acc)
    if outputs.loss is not None:
        tl.store(outputs.loss + row, tl.where(target.active, loss, 0.0).to(outputs.loss.dtype.element_ty))
    best = better_of(target, sums.m, sums.best - place.low)
    store_stats(outputs, row, row < n_rows, target, of_row, d, log_d, sums.below, best)

    if WRITES:
        r = load_factor(cotangents, strides.dloss, norm_ptr, batch.sample_weight_ptr, row, target.active, NORMS, acc)
        factors = gradient_of_row(r, of_row, target, formula, cotangents, row)
        write_row(batch, place, held, target, factors, strides, formula, cotangents.entropy is not None, tile)
