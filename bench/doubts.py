"""What a reader should doubt: a device that was slowed down while it was measured, and figures that are noisy.

A GPU says itself why its clocks are low (NVML's clocks event reasons). What it does not say is seen in the clocks under
the same load, a copy, before the first case and after the last; of an idle device they mean nothing. A fall of FALL
counts, which is as much as `compare` tolerates of a kernel's time.
"""

from collections.abc import Iterator

from bench.results import NOISY, Results

FALL = 0.05
CLOCKS = ("clock_mhz", "memory_clock_mhz")
OCCASIONS = ("before", "under_load", "under_load_after", "after")
REASONS = {
    0x04: "software power cap",
    0x08: "hardware slowdown",
    0x20: "software thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
}


def doubts(results: Results) -> Iterator[str]:
    """In words, a sentence each; nothing where there is none."""
    seen = {when: results.environment.get(when, {}) for when in OCCASIONS}
    for bit, reason in REASONS.items():
        times = [when for when, state in seen.items() if mask_of(state.get("throttled")) & bit]
        if times:
            yield f"the device was throttled ({', '.join(times)}): {reason}"
    for name in CLOCKS:
        first, last = (number(seen[when].get(name)) for when in ("under_load", "under_load_after"))
        if first and last and last < (1 - FALL) * first:
            yield f"{name} under load fell from {first:g} to {last:g}, by {100 * (1 - last / first):.0f} %"
    shown = [one for one in results.measurements if not (results.on_cpu and one.contender == "copy")]
    figures = [figure for one in shown if (figure := results.figure(one))]
    noisy = sum(figure.noisy for figure in figures)
    if noisy:
        yield f"{noisy} of {len(figures)} figures are noisy, by more than {100 * NOISY:g} %, and not shown"


def mask_of(text: object) -> int:
    """As nvidia-smi writes it, 0x0000000000000004; 0 where it does not know."""
    try:
        return int(str(text), 16)
    except ValueError:
        return 0


def number(text: object) -> float | None:
    try:
        return float(str(text))
    except ValueError:  # not known
        return None
