"""Hidden states of any shape, strides and dtype, every option, chunks of any size: against float64 on all logits."""

import contextlib
import io
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from bench.machine import Cpu
from exactness import by_reference, rows_of
from softxent import dispatch, fused_linear_softmax_xent_with_stats, linear_logprobs, linear_rows, reference

pytestmark = pytest.mark.usefixtures("short_wide_rows")
STATS = ("lse", "entropy", "target_logprob")
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
QUICKLY = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Call(NamedTuple):
    tensors: dict[str, Tensor]  # input, linear_weight, linear_bias, target or ids, weight, sample_weight, logit_scale
    options: dict[str, Any]
    learned: list[str]  # of the tensors
    rows: int | None  # of a chunk; None: no bound given
    told: bool  # the number of rows that count is not asked for
    recorded: bool  # a backward pass that may be differentiated


@st.composite
def calls(
    draw: st.DrawFn,
    shapes: tuple[tuple[int, ...], ...] = ((1,), (2,), (7,), (33,), (3, 5), (2, 1, 4)),
    features: tuple[int, ...] = (1, 2, 5, 8, 17),
    classes: tuple[int, ...] = (1, 2, 3, 10, 33, 129, 300),
) -> Call:
    pick = lambda *of: draw(st.sampled_from(of))  # noqa: E731
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype, of_weight = pick((F64, F64), (F32, F32), (BF16, BF16), (F16, F16), (BF16, F32), (F16, F32))
    acc = torch.promote_types(dtype, F32)
    shape, n_features, n_cols = pick(*shapes), pick(*features), pick(*classes)
    kind = pick("indices", "indices", "indices", "probabilities", "ids")
    std = pick(0.02, 1.0, 4.0)
    tensors = {
        "input": laid(torch.randn(*shape, n_features, generator=g).to(dtype), pick(*LAYOUTS)),
        "linear_weight": laid((torch.randn(n_cols, n_features, generator=g) * std).to(of_weight), pick(*LAYOUTS)),
    }
    if draw(st.booleans()):
        tensors["linear_bias"] = torch.randn(n_cols, generator=g).to(of_weight)
    options: dict[str, Any] = {"softcap": pick(None, None, 2.0, 30.0), "logit_scale": pick(1.0, 0.3, 2.5)}
    options["accum_dtype"] = pick(None, F32) if of_weight.itemsize < 8 else None
    ignored = torch.rand(shape, generator=g) < pick(0.0, 0.3, 0.9)
    if kind == "probabilities":
        y = torch.rand(*shape, n_cols, generator=g).to(pick(dtype, acc))
    else:
        of_token = (*shape, pick(1, 2, 5)) if kind == "ids" else shape
        y = torch.randint(n_cols, of_token, generator=g)
        options["ignore_index"] = pick(-100, -100, 0, n_cols - 1)
        y[ignored if kind == "indices" else torch.rand(of_token, generator=g) < 0.3] = options["ignore_index"]
    if kind == "indices" and n_cols < 256 and options["ignore_index"] >= 0:
        y = y.to(pick(torch.int64, torch.int32, torch.uint8))
    tensors["target" if kind != "ids" else "ids"] = y
    options["shift"] = kind != "ids" and draw(st.booleans())
    if kind != "ids":
        options |= {"label_smoothing": pick(0.0, 0.1, 1.0), "z_loss": pick(0.0, 1e-4, 0.5)}
        options["reduction"] = pick("none", "mean", "sum")
        if options["reduction"] == "mean" and draw(st.booleans()):
            options["normalizer"] = pick(0.5, 7.0)
        if draw(st.booleans()):
            tensors["weight"] = torch.rand(n_cols, generator=g).to(acc) + 0.1
        if draw(st.booleans()):
            tensors["sample_weight"] = (torch.randint(0, 4, shape, generator=g) / 2).to(acc)
        options["stats"] = tuple(s for s in STATS if draw(st.booleans()) and (s != STATS[2] or kind == "indices"))
    if draw(st.booleans()):
        tensors["logit_scale"] = torch.tensor(options.pop("logit_scale"), dtype=acc)
    may_learn = ["input", "linear_weight", "linear_bias", "logit_scale", "sample_weight"]
    may_learn += ["target"] if kind == "probabilities" else []
    learned = [name for name in may_learn if name in tensors and draw(st.booleans())]
    return Call(
        tensors, options, learned or ["input"], pick(None, 1, 2, 3, 10), draw(st.booleans()), pick(False, False, True)
    )


LAYOUTS = "contiguous", "contiguous", "transposed", "strided"


def laid(x: Tensor, layout: str) -> Tensor:
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        wide = x.new_full((*x.shape, 2), float("nan"))
        wide[..., 0] = x
        return wide[..., 0]
    return x


class Done(NamedTuple):
    loss: Tensor  # or the log-probabilities of ids
    stats: dict[str, Tensor]
    gradients: dict[str, Tensor]
    sizes: Tensor  # [n_rows, n_cols]: what the gradients of logits are small differences of


def cotangent(x: Tensor, which: int) -> Tensor:
    values = torch.randn(x.shape, generator=torch.Generator().manual_seed(which), dtype=F32)
    return values.to(x)


def total(loss: Tensor, stats: dict[str, Tensor]) -> Tensor:
    """With a gradient of its own for each."""
    parts = [loss, *stats.values()]
    return torch.stack([(x.double() * cotangent(x, i).double()).sum() for i, x in enumerate(parts)]).sum()


def of_op(
    call: Call, n_bytes: int | None, valid_rows: int | None
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    tensors = {k: v.detach().requires_grad_(k in call.learned) for k, v in call.tensors.items()}
    versions = {k: v._version for k, v in tensors.items()}
    x, w, *_ = tensors.values()
    named: dict[str, Any] = {**{k: v for k, v in tensors.items() if v is not x and v is not w}, **call.options}
    named |= {"max_logits_bytes": n_bytes, "valid_rows": valid_rows}
    if "ids" in named:
        loss, entropy = linear_logprobs(x, w, **named)
        stats = {"entropy": entropy}
    else:
        found = fused_linear_softmax_xent_with_stats(x, w, **named)
        loss, stats = found.loss, {name: getattr(found, name) for name in call.options["stats"]}
    leaves = [tensors[name] for name in call.learned]
    gradients = torch.autograd.grad(total(loss, stats), leaves, create_graph=call.recorded, materialize_grads=True)
    assert all(v._version == versions[k] and torch.equal(v, call.tensors[k]) for k, v in tensors.items())
    return loss.detach(), {k: v.detach() for k, v in stats.items()}, dict(zip(call.learned, gradients, strict=True))


def of_formula(call: Call, dtype: torch.dtype) -> Done:
    """On all of the logits at once, by reference.py and autograd."""
    tensors = {
        k: (v.to(dtype) if v.is_floating_point() else v).detach().requires_grad_(k in call.learned)
        for k, v in call.tensors.items()
    }
    shape = tensors["input"].shape[:-1]
    of_rows = {k: tensors[k] for k in ("input", "target", "ids", "sample_weight") if k in tensors}
    if call.options.get("shift"):
        of_rows = {k: v.narrow(len(shape) - 1, int(k != "input"), shape[-1] - 1) for k, v in of_rows.items()}
        shape = torch.Size([*shape[:-1], shape[-1] - 1])
    x, *y = (v.reshape(shape.numel(), *v.shape[len(shape) :]) for v in of_rows.values())
    z = F.linear(x, tensors["linear_weight"], tensors.get("linear_bias"))
    z = z if z.requires_grad else z.requires_grad_()
    options = {k: v for k, v in call.options.items() if k not in ("shift", "accum_dtype", "stats")}
    options |= {k: tensors[k] for k in ("weight", "logit_scale") if k in tensors}
    options |= dict(zip(list(of_rows)[2:], y[1:], strict=True))
    ids = kept = None
    if "ids" in tensors:
        ids, kept = y[0].long(), y[0] != options["ignore_index"]
        y[0], options["ignore_index"] = torch.where(kept.any(1), 0, -100), -100
    inputs, settings = rows_of(z, y[0], **options)
    log_p = torch.log_softmax(reference.logit_map(z, settings, inputs.logit_scale), 1)
    stats = reference.row_stats(inputs, settings)
    stats = stats if inputs.sample_weight is None else stats.without(inputs.sample_weight == 0)
    if ids is not None and kept is not None:
        loss, wanted = torch.where(kept, log_p.gather(1, torch.where(kept, ids, 0)), 0), ("entropy",)
        loss = loss.reshape(*shape, -1)
    else:
        loss, wanted = by_reference(z, y[0], **options), call.options["stats"]
        loss = loss.reshape(shape) if settings.reduction == "none" else loss
    found = {name: getattr(stats, name).reshape(shape) for name in wanted}
    leaves = [tensors[name] for name in call.learned]
    *gradients, dz = torch.autograd.grad(total(loss, found), [*leaves, z], materialize_grads=True)
    lse = z.new_zeros(len(z)) if stats.lse is None else stats.lse.detach().abs()
    n = 1 if settings.reduction != "mean" or ids is not None else reference.counts(inputs, settings, dtype).sum()
    n = n if inputs.normalizer is None else inputs.normalizer
    incoming = cotangent(loss, 0).abs() * (1 + settings.z_loss * (1 + lse.max() if len(lse) else 0)) / n
    incoming = incoming.reshape(len(z), loss.numel() // max(1, len(z))).sum(1) if loss.dim() else incoming.reshape(1)
    for i, name in enumerate(wanted):
        incoming = incoming + (cotangent(found[name], 1 + i) * (1 + found[name].detach().abs())).abs().flatten()
    sizes = dz.abs() + log_p.detach().exp() * incoming[:, None]
    return Done(loss, found, dict(zip(call.learned, gradients, strict=True)), sizes)


def rows_that_count(call: Call) -> int:
    y = call.tensors.get("target", call.tensors.get("ids"))
    assert y is not None
    shape = call.tensors["input"].shape[:-1]
    kept = torch.ones(shape, dtype=torch.bool)
    if not y.is_floating_point():
        kept = y.long() != call.options["ignore_index"]
        kept = kept.any(-1) if "ids" in call.tensors else kept
    if "sample_weight" in call.tensors:
        kept = kept & (call.tensors["sample_weight"] != 0)
    return int(kept[..., 1:].sum() if call.options.get("shift") else kept.sum())


def bytes_for(call: Call, rows: int, valid_rows: int | None) -> int:
    """Of a chunk of about so many."""
    with pytest.raises(ValueError, match="one row needs") as raised:
        of_op(call, 1, valid_rows)
    least = int(str(raised.value).split("needs, ")[1].split(":")[0])
    n_cols, n_features = call.tensors["linear_weight"].shape
    return least + (rows - 1) * (n_cols + 2 * n_features) * max(4, call.tensors["input"].itemsize)


@contextlib.contextmanager
def as_on_a_gpu(told: bool) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if told:
            patch.setattr(linear_rows, "_may_wait", lambda tensor: False)
        yield


def check(call: Call) -> None:
    exact, plain = (of_formula(call, dtype) for dtype in (F64, torch.promote_types(call.tensors["input"].dtype, F32)))
    learns_rows = "sample_weight" in call.learned  # and reads all
    valid_rows = rows_that_count(call) + call.told if call.told and not learns_rows else None
    with as_on_a_gpu(call.told):
        n_bytes = None if call.rows is None else bytes_for(call, call.rows, valid_rows)
        loss, stats, gradients = of_op(call, n_bytes, valid_rows)
    eps = torch.finfo(loss.dtype).eps
    x, w = (call.tensors[name].double().abs() for name in ("input", "linear_weight"))
    x = (x[..., :-1, :] if call.options.get("shift") else x).reshape(len(exact.sizes), x.shape[-1])
    sizes = x @ w.T + call.tensors.get("linear_bias", torch.zeros(())).double().abs()  # what the logits are sums of
    scale = float(call.tensors.get("logit_scale", call.options.get("logit_scale", 1.0)))
    largest = 1 + scale * float(sizes.max()) if sizes.numel() else 1.0
    dz = exact.sizes
    terms = {
        "input": (dz @ w).amax() if dz.numel() else 0.0,
        "linear_weight": (dz.T @ x).amax() if dz.numel() else 0.0,
        "linear_bias": dz.sum(0).amax() if dz.numel() else 0.0,
        "logit_scale": (dz * sizes).sum() / scale,
    }
    chunks = len(exact.sizes) + 1
    narrow = call.tensors["linear_weight"].itemsize < 4 and call.options["accum_dtype"] is None
    named = {"loss": (loss, exact.loss, plain.loss)}
    named |= {name: (stats[name], exact.stats[name], plain.stats[name]) for name in stats}
    if not exact.loss.isnan().any():  # a mean of nothing
        named |= {f"d{k}": (gradients[k], exact.gradients[k], plain.gradients[k]) for k in gradients}
    for what, (found, right, simple) in named.items():
        assert found.shape == right.shape, what
        right, simple, found64 = right.detach(), simple.detach().double(), found.double()
        assert torch.equal(found64.isnan(), right.isnan()), f"{what}: NaN"
        if not right.numel() or right.isnan().all():
            continue
        rounding = torch.finfo(found.dtype).eps
        of_terms = float(terms.get(what[1:], 0.0)) if what.startswith("d") else 0.0
        allowed = 4 * (simple - right).abs().amax() + 2 * rounding * right.abs() + torch.finfo(found.dtype).tiny
        allowed = allowed + 16 * eps * largest * (of_terms + float(right.abs().amax()) + (what[0] != "d"))
        if what == "dlinear_weight" and narrow:
            allowed = allowed + chunks * rounding * of_terms
        error = (found64 - right).abs()
        worst = (error - allowed).argmax()
        assert (error <= allowed).all(), (
            f"{what}: {found64.flatten()[worst]:.9g}, exactly {right.flatten()[worst]:.9g}, "
            f"allowed {allowed.flatten()[worst]:.3g}"
        )


@QUICKLY
@given(call=calls())
def test_any_call_is_as_exact_as_the_formula(path: str, call: Call) -> None:
    check(call)


def bytes_of(tensors: Any) -> int:
    return sum(x.nbytes for x in tensors)


LARGE = calls(shapes=((64,), (3, 40)), features=(4, 32), classes=(1000, 2003))


def check_bytes(call: Call) -> None:
    call = call._replace(tensors={k: v.contiguous() for k, v in call.tensors.items()}, recorded=False)
    if call.options.get("shift"):  # the gradient of a part of it takes as much again
        call = call._replace(learned=[name for name in call.learned if name not in ("target", "input")] or ["input"])
    valid_rows = rows_that_count(call) if call.told else None
    with as_on_a_gpu(call.told), contextlib.redirect_stderr(io.StringIO()):
        n_bytes, kept = bytes_for(call, call.rows or 20, valid_rows), list[Any]()
        most = Cpu().peak_bytes(lambda: kept.append(of_op(call, n_bytes, valid_rows)))
    w, n_rows = call.tensors["linear_weight"], call.tensors["input"].shape[:-1].numel()
    wider = call.options["accum_dtype"] == F32 and w.itemsize < 4 and "linear_weight" in call.learned
    of_gradients = bytes_of(kept[0][2].values()) + w.numel() * 4 * wider
    of_rows = n_rows * 8 * (24 + 4 * (call.tensors["ids"].shape[-1] if "ids" in call.tensors else 0))
    assert most <= n_bytes + of_gradients + of_rows, f"{most - of_gradients} bytes, {n_bytes} allowed"


@settings(QUICKLY, max_examples=12)
@given(call=LARGE)
def test_no_more_is_alive_than_a_chunk_may_take(call: Call) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "INTERPRET", False)
        check_bytes(call)
