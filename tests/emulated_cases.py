"""Cases of the public operation for the emulator: python tests/emulated_cases.py FILE NAME ... runs them, and saves
what came of each.

Every kernel, each dtype where the code differs, rows that lie in granules, odd ones and ones that lie apart, in place,
soft targets, stats, all options at once, softmax, ignored rows, and the widest rows. In a process of its own, without
TRITON_INTERPRET: what has to be compiled is compiled once, and run with two seeds of noise, and contracted.
"""

import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    for folder in ("kernels", "tests", "."):
        sys.path.insert(0, str(Path(__file__).parents[1] / folder))

import torch
import torch.nn.functional as F
from torch import Tensor

import softxent
from exactness import by_reference, composed
from softxent.options import Inputs, Options, Stats
from softxent.parallel.shards import Shard, fields_of, implementation

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
ALL = {
    "label_smoothing": 0.1,
    "z_loss": 1e-4,
    "softcap": 30.0,
    "logit_scale": 0.5,
    "weight": True,
    "sample_weight": True,
}
STATS = ("lse", "entropy", "target_logprob", "prediction")
RUNS: tuple[dict[str, Any], ...] = ({"seed": 0}, {"seed": 1}, {"seed": 0, "contract": True})


class Case(NamedTuple):
    n_rows: int
    n_cols: int
    dtype: torch.dtype = F32
    options: dict[str, Any] = {}  # noqa: RUF012, of the operation
    op: str = "indices"  # "probabilities", "stats", "softmax", "log_softmax"
    times: float = 1  # what the loss is multiplied by
    stride: tuple[int, int] = (0, 1)  # of the logits' rows and columns, if they lie apart, one value within a granule
    arch: int = 90
    ignored: bool = True  # the second row


NARROW = {
    "10": Case(600, 10),
    "10 bfloat16": Case(600, 10, BF16),
    "10, one launch": Case(250, 10),
    "10, one launch, all options": Case(100, 10, F32, ALL),
    "2, many rows": Case(20000, 2),
    "100, all options": Case(70, 100, F32, ALL),
    "100, stats": Case(70, 100, F32, {}, "stats"),
    "100 float64": Case(40, 100, F64, {"label_smoothing": 0.1}),
    "101, apart": Case(50, 101, stride=(107, 1)),
    "101, columns apart": Case(20, 101, stride=(203, 2)),
    "1000 bfloat16": Case(64, 1000, BF16),
    "1000 bfloat16, scaled": Case(64, 1000, BF16, {"weight": True}, times=3),
    "1000 float16": Case(64, 1000, F16),
    "301": Case(40, 301),
    "1000 bfloat16, in place": Case(64, 1000, BF16, {"inplace": True}),
    "100, probabilities": Case(40, 100, F32, {"label_smoothing": 0.1, "weight": True, "z_loss": 1e-4}, "probabilities"),
    "1000 bfloat16, probabilities": Case(32, 1000, BF16, {}, "probabilities"),
    "100 bfloat16, stats, sm_80": Case(64, 100, BF16, {}, "stats", arch=80),
    "100, all options, sm_100": Case(40, 100, F32, ALL, arch=100),
}
WIDE = {
    "2048, all options": Case(8, 2048, F32, ALL),
    "2049, all options": Case(8, 2049, F32, ALL),
    "3001 bfloat16, stats": Case(8, 3001, BF16, {}, "stats"),
    "4096 bfloat16, scaled": Case(8, 4096, BF16, {"weight": True}, times=3),
    "4096, none": Case(6, 4096, F32, {"reduction": "none"}),
    "5000 float64": Case(4, 5000, F64),
    "5001 bfloat16, probabilities": Case(6, 5001, BF16, ALL, "probabilities"),
    "5000, columns apart": Case(4, 5000, stride=(10001, 2)),
    "32000 bfloat16": Case(6, 32000, BF16),
    "32000 float16": Case(4, 32000, F16),
    "50257 bfloat16": Case(5, 50257, BF16),
    "50257 bfloat16, in place": Case(5, 50257, BF16, {"inplace": True}),
    "50257 bfloat16, apart": Case(3, 50257, BF16, stride=(50261, 1)),
    "50257": Case(3, 50257),
    "50257, sm_80": Case(2, 50257, arch=80),
    "50257 bfloat16, sm_100": Case(2, 50257, BF16, arch=100),
    "128256 bfloat16": Case(3, 128256, BF16),
    "128256": Case(2, 128256),
    "262144 bfloat16": Case(2, 262144, BF16),
    "262144": Case(1, 262144),
}
SOFTMAX = {
    "softmax 10": Case(600, 10, op="softmax"),
    "softmax 301 bfloat16": Case(32, 301, BF16, op="softmax"),
    "softmax 20000 float16": Case(3, 20000, F16, op="softmax"),
    "log_softmax 100": Case(60, 100, op="log_softmax"),
    "log_softmax 50257 bfloat16": Case(3, 50257, BF16, op="log_softmax"),
}
SHARDS = {
    "5001 bfloat16 in shards": Case(6, 5001, BF16, {"reduction": "sum"}, "shards"),
    "3000 in shards, all options": Case(6, 3000, F32, ALL | {"reduction": "sum"}, "shards"),
}
GROUPS = {"narrow": NARROW, "wide": WIDE, "softmax": SOFTMAX, "shards": SHARDS}
CASES = NARROW | WIDE | SOFTMAX | SHARDS


def outputs(case: Case, how: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The loss or the results, and gradients. how: "ours"; "torch", as people write it; or "exact", in float64."""
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=F64).to(device)

    dtype, wide = case.dtype, F64 if how == "exact" else case.dtype
    values, dout = random(case.n_rows, case.n_cols).mul(3).to(dtype), random(case.n_rows, case.n_cols).to(dtype)
    logits = values.to(wide)
    if case.stride != (0, 1) and how == "ours":
        row, col = case.stride
        room = torch.full((case.n_rows, row), float("inf"), dtype=dtype, device=device)  # which nobody reads
        logits = room[:, 1 : 1 + case.n_cols * col : col].copy_(values)
    logits.requires_grad_()
    if case.op in ("softmax", "log_softmax"):
        result = getattr(softxent if how == "ours" else torch, case.op)(logits, 1)
        result.backward(dout.to(wide))
        return {"result": result.detach(), "gradient": _gradient(logits)}
    target = torch.randint(case.n_cols, (case.n_rows,), generator=generator).to(device)
    if case.ignored and case.n_rows > 1:
        target[1] = -100
    if case.op == "probabilities":
        target = random(case.n_rows, case.n_cols).softmax(1).to(dtype).to(wide).requires_grad_()
    options = dict(case.options)
    if options.get("weight"):
        options["weight"] = random(case.n_cols).abs().add(0.5).to(dtype).to(wide)
    if options.get("sample_weight"):
        wider = torch.promote_types(wide, F32)
        options["sample_weight"] = random(case.n_rows).abs().to(torch.promote_types(dtype, F32)).to(wider)
    dloss = random(case.n_rows).to(dtype).to(wide)
    if case.op == "shards" and how == "ours":
        return _in_shards(logits.detach(), target, options)
    if case.op == "stats":
        return _stats(logits, target, how, dloss)
    x = logits * 1 if options.pop("inplace", False) and how == "ours" else logits
    if how == "ours":
        loss = softxent.fused_softmax_xent(x, target, inplace=x is not logits, **options)
    else:
        loss = (by_reference if how == "exact" else composed)(x, target, **options)
    (loss * case.times).backward(dloss if loss.dim() else None)
    found = {"loss": loss.detach(), "gradient": _gradient(logits)}
    if target.grad is not None:
        found["gradient of the target"] = target.grad
    return found


def _gradient(logits: Tensor) -> Tensor:
    assert logits.grad is not None
    return logits.grad


def slice_of(whole: Inputs, shard: Shard) -> Inputs:
    at = slice(shard.start, shard.start + shard.n_cols)
    soft = whole.target.is_floating_point()
    weight = None if whole.weight is None else whole.weight[at]
    return whole._replace(
        logits=whole.logits[:, at], target=whole.target[:, at] if soft else whole.target, weight=weight
    )


def _in_shards(logits: Tensor, target: Tensor, options: dict[str, Any]) -> dict[str, Tensor]:
    """As ranks that hold two slices of the classes, and one that holds none, have it between them."""
    given = {name: value for name, value in options.items() if name not in ("weight", "sample_weight")}
    whole = Inputs(logits, target, options.get("weight"), options.get("sample_weight"))
    n_cols, cut = logits.shape[1], logits.shape[1] * 2 // 5
    shards = [
        Shard(start, end - start, n_cols, n_cols - cut, None)
        for start, end in ((0, cut), (cut, n_cols), (n_cols, n_cols))
    ]
    parts = [slice_of(whole, shard) for shard in shards]
    settings, fields = Options(**given), fields_of(whole, Options(**given), ())
    module = implementation(logits)
    gathered = torch.stack(
        [module.sums(part, settings, *of) for part, *of in zip(parts, shards, [fields] * 3, strict=True)]
    )
    ones = gathered.new_ones(len(logits)) if whole.sample_weight is None else whole.sample_weight
    made = []
    for part, shard in zip(parts, shards, strict=True):
        loss, _, row = module.combine(gathered, part, settings, shard, fields, ())
        made.append(module.gradient_like(part.logits, part.logits.dtype))
        module.gradient(row, ones, Stats(), part, settings, shard, made[-1], None)
    return {"loss": (loss * ones).sum().to(logits.dtype), "gradient": torch.cat(made, 1)}


def _stats(logits: Tensor, target: Tensor, how: str, dout: Tensor) -> dict[str, Tensor]:
    if how == "ours":
        found = softxent.fused_softmax_xent_with_stats(logits, target, stats=STATS, reduction="sum")
        loss, results = found.loss, [getattr(found, name) for name in STATS]
    else:
        z = logits.to(torch.promote_types(logits.dtype, F32))
        counts = (target != -100)[:, None]
        log_p = z.log_softmax(1)
        loss = F.cross_entropy(z, target, reduction="sum")
        of_row = z.logsumexp(1), -(log_p.exp() * log_p).sum(1), log_p.gather(1, target.clamp(0)[:, None])[:, 0]
        results = [torch.where(counts[:, 0], x, 0) for x in of_row]
        results.append(torch.where(counts[:, 0], z.argmax(1), -1))
    differentiable = [(loss, torch.ones_like(loss))]
    differentiable += [(x, dout.to(x.dtype) * k) for k, x in enumerate(results[:3], 1)]
    torch.autograd.backward([x for x, _ in differentiable], [d for _, d in differentiable])
    results = [x.detach() for x in (loss.to(logits.dtype), *results)]
    return dict(zip(("loss", *STATS), results, strict=True)) | {"gradient": _gradient(logits)}


def emulate(name: str, runs: tuple[dict[str, Any], ...] = RUNS) -> dict[str, Any]:
    """What came of a case: outputs and faults of each run, counts of the first by kernel, seconds of a
    core."""
    from ptx.emulated import Emulated

    case, began = CASES[name], sum(os.times()[:4])
    found: dict[str, Any] = {"outputs": [], "faults": []}
    for how in runs:
        with Emulated(case.arch, **how) as launches:
            found["outputs"].append(outputs(case, "ours"))
        found["faults"] += [f"{how} {launch.name}: {fault}" for launch in launches for fault in launch.report.faults]
        if how == runs[0]:
            found["launches"] = [(launch.name, launch.constants, launch.report.totals()) for launch in launches]
    found["seconds"] = sum(os.times()[:4]) - began
    return found


def main() -> None:
    torch.use_deterministic_algorithms(True)  # which fills what torch.empty makes with NaN
    torch.set_num_threads(1)
    file, *names = sys.argv[1:]
    torch.save({name: emulate(name) for name in names}, file)


if __name__ == "__main__":
    main()
