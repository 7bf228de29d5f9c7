"""Measure the memory that torch allocates in a training step."""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(step: Callable[[], object]) -> int:
    """Return the most bytes that a step holds at once beyond what was held before it, on a CPU.

    Call the step once before: compiling allocates, too. Each allocation and release of torch is counted; what others
    allocate, as the buffers of a library of matrix products, is not.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    held = peak = 0
    events = [event for event in found.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
