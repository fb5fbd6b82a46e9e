"""torch.compile of what `eager` calls: all of it one graph, for one shape (dynamic=False), and its backward too.

The function is compiled; autograd through it runs the backward that AOTAutograd made of the same graph. Inductor's
defaults. On a CPU it writes C++, on a GPU Triton.
"""

import os
import shutil
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from bench.contenders import Contender, Function, Unavailable, eager, op_of


def load(name: str, device_type: str) -> Contender:
    need_compiler(device_type)
    return Contender(name, op_of(name), torch.__version__, lambda case: compile_anew(eager.make(case)))


def need_compiler(device_type: str) -> None:
    """What Inductor hands its code to."""
    if device_type != "cpu":
        if find_spec("triton") is None:
            raise Unavailable("Triton is not installed")
        return
    compiler, headers = os.environ.get("CXX", "g++"), Path(sysconfig.get_path("include"), "Python.h")
    if shutil.which(compiler) is None:
        raise Unavailable(f"no C++ compiler ({compiler})")
    if not headers.exists():
        raise Unavailable(f"Inductor's C++ includes {headers}, which is not installed")
    for folder in (Path(torch.__file__).parent, headers.parent):
        if " " in str(folder):
            raise Unavailable(f"Inductor's command for the C++ compiler breaks at the space in {folder}")


def compile_anew(function: Function) -> Function:
    """Compiled, and what was compiled before forgotten: a line of code may have only so many versions."""
    torch.compiler.reset()
    # What it finds by timing is not kept: `python -m bench gpu` compiles in several processes, who disturb each other.
    alone: dict[str, Any] = {"autotune_local_cache": False}
    compiled: Function = torch.compile(function, fullgraph=True, dynamic=False, options=alone)
    return compiled
