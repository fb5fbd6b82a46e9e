"""A GPU in four minutes: python bench/quick.py DIR

The mean's step and forward pass at the widths that decide, beside a copy, eager PyTorch, torch.compile and Liger: the
suite of `python -m bench gpu` with fewer cases, whose other options can follow. The same command goes on where it was
cut off.
"""

import runpy
import sys
from pathlib import Path

CASES = ["--only=cross_entropy mean", "--widths=10,100,1000,32000,50257,128256,262144"]

if __name__ == "__main__":
    folder, *options = sys.argv[1:] or ["--help"]
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.argv[1:] = ["gpu", f"--out={folder}", "--minutes=4", *CASES, *options]
    runpy.run_module("bench", run_name="__main__")
