"""Triton's own launcher for CUDA, built and called: the driver below it alone is a stand-in, which writes down what it
is given. So it is seen without a GPU whether tuples in tuples are taken apart, and None among pointers.

In a process of its own, since nothing compiles where TRITON_INTERPRET was set before Triton was imported.
"""

import ctypes
import json
import os
import shutil
import struct
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
CASES = (
    "10",
    "10, one launch, all options",
    "100, stats",
    "101, columns apart",
    "1000 bfloat16, scaled",
    "1000 bfloat16, probabilities",
    "4096, none",
    "5000 float64",
    "50257 bfloat16, in place",
    "softmax 10",
    "log_softmax 100",
    "5001 bfloat16 in shards",
    "3000 in shards, all options",
)
DRIVER = r"""
#include <cuda.h>
#include <string.h>
static int count, sizes[256];
static char given[256][8];
static unsigned grid[3], block;
static CUstream in_stream;
void expect(int n, const int *bytes) {
  count = n; memset(given, 0, sizeof given); memcpy(sizes, bytes, n * sizeof *bytes);
}
const void *seen(void) { return given; }
const unsigned *seen_grid(void) { return grid; }
unsigned seen_block(void) { return block; }
void *seen_stream(void) { return in_stream; }
CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **p, void **extra) {
  grid[0] = c->gridDimX; grid[1] = c->gridDimY; grid[2] = c->gridDimZ; block = c->blockDimX; in_stream = c->hStream;
  for (int i = 0; i < count; i++) memcpy(given[i], p[i], sizes[i]);
  return 0;
}
CUresult cuPointerGetAttribute(void *out, CUpointer_attribute a, CUdeviceptr p) { *(CUdeviceptr *)out = p; return 0; }
CUresult cuCtxGetCurrent(CUcontext *c) { *c = (CUcontext)1; return 0; }
CUresult cuCtxSetCurrent(CUcontext c) { return 0; }
CUresult cuDeviceGet(CUdevice *d, int i) { *d = 0; return 0; }
CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute a, CUdevice d) { *v = 232448; return 0; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice d) { *c = (CUcontext)1; return 0; }
CUresult cuModuleLoadData(CUmodule *m, const void *image) { *m = (CUmodule)1; return 0; }
CUresult cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { *f = (CUfunction)1; return 0; }
CUresult cuFuncGetAttribute(int *v, CUfunction_attribute a, CUfunction f) { *v = 1024; return 0; }
CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute a, int v) { return 0; }
CUresult cuFuncSetCacheConfig(CUfunction f, CUfunc_cache c) { return 0; }
CUresult cuDriverGetVersion(int *v) { *v = 12080; return 0; }
CUresult cuCtxGetLimit(size_t *v, CUlimit l) { *v = 0; return 0; }
CUresult cuCtxSetLimit(CUlimit l, size_t v) { return 0; }
CUresult cuGetErrorString(CUresult e, const char **s) { *s = "an error"; return 0; }
"""
NUMBERS = {"i1": "b", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "fp32": "f", "fp64": "d"}
HEADERS = Path(sysconfig.get_path("include"), "Python.h").exists()


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (no build for this platform)")
@pytest.mark.skipif(not (shutil.which("gcc") and HEADERS), reason="a launcher is built with gcc, and Python's headers")
def test_every_kernel_is_given_its_arguments_by_tritons_launcher(tmp_path: Path) -> None:
    """First through Triton, then by a handle."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(str(ROOT / folder) for folder in ("kernels", "tests", "."))
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "TRITON_LIBCUDA_PATH": str(tmp_path)}
    command = [sys.executable, __file__, str(tmp_path)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    found = json.loads(process.stdout)
    assert found["wrong"] == [] and len(found["kernels"]) == 10
    assert found["first"] == found["by handles"] > 30 and found["asked again"] == 0


def build_driver(folder: Path) -> ctypes.CDLL:
    """Loaded so that whoever asks for libcuda.so.1 gets it."""
    import triton

    source, built = folder / "driver.c", folder / "libcuda.so.1"
    source.write_text(DRIVER)
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["gcc", "-shared", "-fPIC", f"-I{include}", "-Wl,-soname,libcuda.so.1", str(source), "-o", str(built)]
    subprocess.run(command, check=True)
    driver = ctypes.CDLL(str(built), ctypes.RTLD_GLOBAL)
    driver.seen.restype = ctypes.c_void_p
    driver.seen_stream.restype = ctypes.c_void_p
    driver.seen_grid.restype = ctypes.POINTER(ctypes.c_uint)
    return driver


def flat(kind: Any, value: Any) -> list[bytes]:
    """What the kernel has to be given: no constants, and of a pointer its address."""
    if isinstance(kind, tuple):
        return [x for sub, one in zip(kind, value, strict=True) for x in flat(sub, one)]
    if kind == "constexpr":
        return []
    return [struct.pack("Q", value.data_ptr()) if kind[0] == "*" else struct.pack(NUMBERS[kind], value)]


def alone(folder: Path) -> dict[str, Any]:
    driver = build_driver(folder)

    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.backends.nvidia.driver import CudaLauncher, CudaUtils
    from triton.runtime.jit import JITFunction

    import emulated_cases
    from offline import Driver, pretended

    launched: list[str] = []
    wrong: list[str] = []
    asked: list[str] = []
    through_triton = JITFunction.run

    class Launcher(CudaLauncher):  # type: ignore[misc]
        def __init__(self, source: Any, metadata: Any) -> None:
            super().__init__(source, metadata)
            self.name, self.kinds, self.warps = source.fn.__name__, source.signature.values(), metadata.num_warps

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            arguments = rest[4:]  # after metadata and hooks
            expected = [v for kind, one in zip(self.kinds, arguments, strict=True) for v in flat(kind, one)]
            driver.expect(len(expected), (ctypes.c_int * len(expected))(*map(len, expected)))
            super().__call__(x, y, z, stream, function, *rest)
            raw = ctypes.string_at(driver.seen(), 8 * len(expected))
            found = [raw[8 * i : 8 * i + len(v)] for i, v in enumerate(expected)]
            place = [*driver.seen_grid()[:3], driver.seen_block(), driver.seen_stream()]
            if found != expected or place != [x, y, z, 32 * self.warps, stream]:
                wrong.append(f"{self.name}: {found} {place} for {expected} {(x, y, z, self.warps, stream)}")
            launched.append(self.name)

    def run(kernel: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(kernel.__name__)
        return through_triton(kernel, *arguments, **options)

    JITFunction.run = run
    CUDABackend.make_cubin = lambda *_: b""  # which nobody runs
    Driver.utils, Driver.launcher_cls, Driver.stream = CudaUtils(), Launcher, 4096
    found: dict[str, Any] = {}
    with pretended(GPUTarget("cuda", 90, 32)):
        for when in ("first", "by handles"):
            launched.clear()
            asked.clear()
            for name in CASES:
                emulated_cases.outputs(emulated_cases.CASES[name], "ours")
            found[when] = len(launched)
    return found | {"kernels": sorted(set(launched)), "asked again": len(asked), "wrong": wrong[:3]}


if __name__ == "__main__":
    print(json.dumps(alone(Path(sys.argv[1]))))
