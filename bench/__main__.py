"""The benchmark suite: python -m bench --help, from the root of a checkout."""

import os
import sys
from pathlib import Path

# Before torch: its profiler, which counts memory, is told not to chat. What is measured is never the interpreter.
os.environ |= {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
os.environ.pop("TRITON_INTERPRET", None)
for folder in ("tests", "kernels"):
    sys.path.insert(0, str(Path(__file__).parents[1] / folder))

from bench.command import main  # noqa: E402

if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    sys.exit(main())
