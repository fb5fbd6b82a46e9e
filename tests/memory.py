"""What torch holds in the memory of the host, from its own account."""

import json
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> int:
    """The most bytes of tensors on the CPU while `step` runs, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        first = torch.empty(1)  # the account of before
        step()
    del first
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    memory = [e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0]
    memory.sort(key=lambda e: e["ts"])
    before = int(memory[0]["args"]["Total Allocated"]) - int(memory[0]["args"]["Bytes"])
    return max(int(e["args"]["Total Allocated"]) for e in memory) - before
