"""Executes the PTX that Triton emits, on a CPU: every thread of a launch, without a GPU.

    kernel = parse(text)                                     text.py
    report = launch(kernel, grid, arguments, regions)        grid.py; the regions' arrays are written
    report.faults, report.totals()                           report.py

    with Emulated(90) as launches:                           emulated.py: through the public operation, on CPU tensors
        fused_softmax_xent(logits, target).backward()
    launches[0].report

A register is a NumPy array, with a value for each thread of some programs, a batch of them at a time. Threads that went
different ways are run lowest instruction first until they meet again. Faults are what a GPU would not survive, or what
no run need repeat:

    bounds       an access outside the tensors of the launch, or the program's shared memory
    alignment    of an access, to its size
    unwritten    a read of shared memory that nobody has written
    barrier      reached by some of a program's threads, or at two places
    absent       a lane that the mask of an exchange names does not take part
    race         two threads access a byte, one of them writes, and no barrier lies between: within a program, or in two
                 programs, which nothing orders. In whatever order they ran here: what counts is where barriers are
    conflict     the same, of one instruction's stores: threads that do not store one value
    endless      the launch does not come to its end

Several threads may store one value that nobody reads: Triton's layouts hold copies. Registers and shared memory start
as noise of a seed, and of several stores at once the last stays, or with an odd seed the first: a result that depends
on either is another with another seed.

Counted are instructions by warps and threads, 32-byte sectors of each warp's accesses (coalescing) and passes over the
banks of shared memory, and each tensor's sectors once (what has to come from memory).

Not modelled: time; ptxas, but that it may contract (contraction.py); a memory model beyond barriers; the last bits of
approximations, which are NumPy's. An instruction, suffix, type or state space that is not listed (instructions.py) is
an error, `Unmodelled`, and never a guess: atomics, clusters, asynchronous copies, calls and local memory are not.
"""

from .grid import launch
from .memory import Region
from .report import Report
from .text import Kernel, Unmodelled, parse

__all__ = ["Kernel", "Region", "Report", "Unmodelled", "launch", "parse"]
