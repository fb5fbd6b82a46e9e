"""Which pipe of a Hopper's multiprocessor code keeps busy longest, against the time that its bytes take.

    time of a pipe = instructions a value / lanes a clock
    time of bytes  = bytes a value / (bytes a second / multiprocessors / clock)

Lanes: CUDA C++ Programming Guide, arithmetic instructions, compute capability 9.0. The rest: NVIDIA's data sheet of the
H100 SXM. A figure above 1 says that the bytes wait; one below does not say that they do not, since it leaves out
latencies, and which instructions can be issued together.
"""

from collections import Counter
from collections.abc import Iterable

BANDWIDTH, MULTIPROCESSORS, CLOCK = 3.35e12, 132, 1.755e9
BYTES_A_CLOCK = BANDWIDTH / MULTIPROCESSORS / CLOCK
LANES = {"issue": 128, "fma": 128, "alu": 64, "imad": 64, "fp64": 64, "lsu": 32, "mufu": 16}  # mufu: conversions too
OF_OPCODE = {
    "fma": "FFMA FMUL FADD HFMA2 HADD2 HMUL2",
    "imad": "IMAD",
    "fp64": "DADD DMUL DFMA DSETP DMNMX",
    "lsu": "LDG STG LDS STS LDL STL LDSM LD ST SHFL",
    "mufu": "MUFU F2I I2F F2F POPC FLO BREV",
    "alu": "ISETP FSETP FSEL FMNMX LOP3 SHF PRMT IADD3 VIADD SEL LEA P2R R2P SGXT PLOP3 F2FP I2FP IMNMX VIMNMX HMNMX2 "
    "MOV BMSK IABS LOP VABSDIFF FCHK HSETP2 CS2R",
}
PIPE = {opcode: pipe for pipe, opcodes in OF_OPCODE.items() for opcode in opcodes.split()}


def by_pipe(opcodes: Iterable[str]) -> Counter[str]:
    """How many go through each pipe; all of them have to be issued."""
    found: Counter[str] = Counter()
    for opcode in opcodes:
        found["issue"] += 1
        if pipe := PIPE.get(opcode.split(".")[0]):
            found[pipe] += 1
    return found


def slowest(instructions: dict[str, float], bytes_moved: float) -> tuple[str, float]:
    """The pipe that takes longest, and how long, in the time of the bytes: of each value."""
    times = {pipe: number / LANES[pipe] / (bytes_moved / BYTES_A_CLOCK) for pipe, number in instructions.items()}
    pipe = max(times, key=times.__getitem__)
    return pipe, times[pipe]
