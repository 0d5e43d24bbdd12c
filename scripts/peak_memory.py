"""The most memory that a piece of work allocates at once, from PyTorch's profiler: exact, and independent of the allocator.

Used by ``benchmark_training.py`` and by the tests of the memory planner.
"""

from collections.abc import Callable

from torch.profiler import ProfilerActivity, profile


def peak_bytes(work: Callable[[], object]) -> int:
    """Bytes on the CPU above what was allocated before, at the worst moment, those inside kernels included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
