"""Launches by handles are those that Triton makes: the same compiled kernel, with the same arguments.

In a process of its own, since nothing compiles where TRITON_INTERPRET was set before Triton was imported. Nothing is
compiled there either: what Triton would compile, by its own key, is what a launch is compared by.
"""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def test_launches_by_handles_are_those_of_triton() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "tests", "."))
    process = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(process.stdout)
    assert found["launches"] > 1000 and found["kernels"] == 10 and found["compiled"] > 100
    assert found["differ"] == []
    assert found["unaligned"] > 0 and found["asked"] == 0
    assert found["asked anew"] == {
        "nothing": 0,
        "other numbers": 0,
        "another batch of its kind": 0,
        "another device": 1,
        "in debug mode": 1,
        "in debug mode again": 0,
        "instrumented": 1,
        "not yet compiled": 1,
        "compiled by now": 1,
        "compiled": 0,
    }
    assert found["handles"] == found["most"]
    assert found["asked on AMD"] == found["launched on AMD"] > 0


def alone() -> dict[str, Any]:
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel
    from triton.runtime.jit import JITFunction

    from bench.codegen import shard_step
    from offline import Driver, pretended
    from softxent import fused_softmax_xent, fused_softmax_xent_with_stats, softmax
    from softxent.options import Inputs, Options
    from softxent.triton_kernels import handles, narrow_rows

    launched: list[Any] = []
    asked: list[str] = []
    through_triton = JITFunction.run

    def described(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            return str(x.dtype), x.shape, x.stride(), x.data_ptr() % 16
        return [described(y) for y in x] if isinstance(x, tuple) else (type(x), x)

    class Uncompiled(CompiledKernel):  # type: ignore[misc]
        def __init__(self, name: str, key: Any) -> None:
            self.name, self.key = name, key
            self.module = self.function = self.packed_metadata = self.src = ""
            self._run = self.launch

        def __del__(self) -> None:
            pass

        def launch(self, *call: Any) -> None:
            grid, stream, hooks, arguments = call[:3], call[3], call[7:9], call[9:]  # and function, metadata
            launched.append((self.name, self.key, (*grid, stream, *hooks), [described(a) for a in arguments]))

    def compile_nothing(kernel: Any, key: Any, signature: Any, device: int, *_: Any) -> Uncompiled:
        compiled = Uncompiled(f"{kernel.__module__}.{kernel.__name__}", key)
        kernel.device_caches[device][0][key] = compiled
        return compiled

    def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(kernel.__name__)
        return through_triton(kernel, *arguments, **options)

    JITFunction._do_compile, JITFunction.run = compile_nothing, run

    def matrix(n_rows: int, n_cols: int, dtype: torch.dtype, lies: str) -> torch.Tensor:
        if lies == "unaligned":
            return torch.zeros(n_rows * n_cols + 1, dtype=dtype)[1:].view(n_rows, n_cols)
        if lies == "columns":
            return torch.zeros(n_cols, n_rows, dtype=dtype).t()
        return torch.zeros(n_rows, n_cols + 6 * (lies == "strided"), dtype=dtype)[:, :n_cols]

    def step(
        n_rows: int,
        n_cols: int,
        dtype: torch.dtype,
        index: torch.dtype,
        lies: str,
        incoming: str,
        soft: bool,
        options: dict[str, Any],
    ) -> None:
        logits = matrix(n_rows, n_cols, dtype, lies).requires_grad_()
        target = matrix(n_rows, n_cols, dtype, lies) if soft else torch.zeros(n_rows, dtype=index)
        options = {name: value() if callable(value) else value for name, value in options.items()}
        if options.pop("stats", False):
            loss = fused_softmax_xent_with_stats(logits, target, stats="lse", **options).loss
        else:
            loss = fused_softmax_xent(logits, target, **options)
        loss.backward(matrix(1, loss.numel(), loss.dtype, incoming).view(loss.shape))

    def softmax_step(n_rows: int, n_cols: int, dtype: torch.dtype) -> None:
        softmax(torch.zeros(n_rows, n_cols, dtype=dtype, requires_grad=True)).sum().backward()

    def of_a_shard(n_cols: int, dtype: torch.dtype, options: dict[str, float], stats: bool) -> None:
        inputs = Inputs(torch.zeros(5, n_cols, dtype=dtype), torch.zeros(5, dtype=torch.int64))
        shard_step(inputs, Options(**options), stats)  # type: ignore[arg-type]

    def steps_of(rng: random.Random) -> list[Callable[[], None]]:
        steps: list[Callable[[], None]] = []
        for _ in range(400):
            n_rows, n_cols = rng.choice((1, 2, 16, 17, 256, 600)), rng.choice((1, 2, 10, 16, 100, 101, 40000, 70000))
            if n_cols > 101:
                n_rows = min(n_rows, 17)
            dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16, torch.float64))
            if rng.random() < 0.1:
                steps.append(partial(softmax_step, n_rows, n_cols, dtype))
                continue
            if rng.random() < 0.1:
                smoothing = {"label_smoothing": 0.1} if rng.random() < 0.5 else {}
                steps.append(partial(of_a_shard, max(16, n_cols // 8), dtype, smoothing, rng.random() < 0.5))
                continue
            soft = rng.random() < 0.2
            options: dict[str, Any] = {}
            for name, values in {
                "reduction": ("sum", "none"),
                "label_smoothing": (0.1, 0.2, 1),
                "z_loss": (1e-4, 2),
                "softcap": (30.0, 10),
                "logit_scale": (0.5, 2),
                "weight": (partial(torch.ones, n_cols), partial(torch.ones, n_cols, dtype=torch.float64)),
                "sample_weight": (partial(torch.ones, n_rows), partial(torch.ones, n_rows, dtype=torch.bfloat16)),
                **(
                    {}
                    if soft
                    else {"ignore_index": (0, 1, 16, 17, 2**31 - 1, 2**31, -(2**31) - 1, 2**40), "stats": (True,)}
                ),
            }.items():
                if rng.random() < 0.2:
                    options[name] = rng.choice(values)
            index = rng.choice((torch.int64, torch.int32))
            lies = rng.choice(("rows", "rows", "strided", "unaligned", "columns"))
            incoming = rng.choice(("rows", "rows", "unaligned"))
            steps.append(partial(step, n_rows, n_cols, dtype, index, lies, incoming, soft, options))
        return steps

    def launches(steps: list[Callable[[], None]], by_handles: bool) -> list[Any]:
        handles.ON = by_handles
        launched.clear()
        asked.clear()
        for i, one in enumerate(steps):
            Driver.stream = i % 3
            one()
        handles.ON = True
        return list(launched)

    def n_asked(n_rows: int = 256, as_a: type[torch.Tensor] = torch.Tensor, **options: Any) -> int:
        asked.clear()
        logits, target = torch.zeros(n_rows, 10), torch.zeros(n_rows, dtype=torch.int64)
        fused_softmax_xent(logits.as_subclass(as_a), target.as_subclass(as_a), **options)
        return len(asked)

    class Elsewhere(torch.Tensor):
        def get_device(self) -> int:
            return 1

    class Future:
        def __init__(self, compiled: Uncompiled) -> None:
            self.compiled = compiled

        def __getattr__(self, name: str) -> Any:
            return getattr(self.compiled, name)

    rng = random.Random(0)
    steps = steps_of(rng)
    with pretended(GPUTarget("cuda", 90, 32)):
        launches(steps, True)
        rng.shuffle(steps)
        ours = launches(steps, True)
        asked_again = len(asked)
        expected = launches(steps, False)
        unaligned = sum(any(_unaligned(a) for a in arguments) for *_, arguments in expected)
        n_asked(label_smoothing=0.1)
        n_asked()
        anew = {
            "nothing": n_asked(),
            "other numbers": n_asked(label_smoothing=0.3),
            "another batch of its kind": n_asked(288),
            "another device": n_asked(as_a=Elsewhere),
        }
        triton.knobs.runtime.debug = True
        anew |= {"in debug mode": n_asked(), "in debug mode again": n_asked()}
        triton.knobs.runtime.debug = False
        triton.knobs.compilation.instrumentation_mode = "consan"
        anew["instrumented"] = n_asked()
        triton.knobs.compilation.instrumentation_mode = ""
        JITFunction._do_compile = lambda *call: Future(compile_nothing(*call))
        anew["not yet compiled"] = n_asked(softcap=7.0, z_loss=0.1)
        anew |= {name: n_asked(softcap=7.0, z_loss=0.1) for name in ("compiled by now", "compiled")}
        JITFunction._do_compile = compile_nothing
        handles.MOST = most = 3
        narrow_rows.small_batch_kernel.handles.clear()
        n_handles = []
        for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16, torch.float32):
            for softcap in (None, 2.0):
                fused_softmax_xent(torch.zeros(9, 10, dtype=dtype), torch.zeros(9, dtype=torch.int64), softcap=softcap)
                n_handles.append(len(narrow_rows.small_batch_kernel.handles))
    with pretended(GPUTarget("hip", "gfx942", 64)):
        launches(steps[:20], True)
        on_amd = len(launches(steps[:20], True))
        asked_on_amd = len(asked)
    return {
        "launches": len(expected),
        "kernels": len({name for name, *_ in expected}),
        "compiled": len({(name, key) for name, key, *_ in expected}),
        "differ": [repr((a[:2], b[:2])) for a, b in zip(ours, expected, strict=True) if a != b][:3],
        "asked": asked_again,
        "unaligned": unaligned,
        "asked anew": anew,
        "handles": max(n_handles),
        "most": most,
        "asked on AMD": asked_on_amd,
        "launched on AMD": on_amd,
    }


def _unaligned(described: Any) -> bool:
    if isinstance(described, list):
        return any(_unaligned(x) for x in described)
    return len(described) == 4 and described[-1] != 0


if __name__ == "__main__":
    print(json.dumps(alone()))
