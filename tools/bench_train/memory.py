"""The most memory that tensors hold at once while something runs."""

from collections.abc import Callable
from typing import Any

import torch
from bench_parts.storage import kept_bytes


def peak_on_cpu(call: Callable[[], Any], *roots: Any) -> int:
    """Bytes of all tensors reachable from `roots` before the call, and the most that is allocated above that in it.

    PyTorch's CPU allocator reports every allocation to the profiler, eager or compiled. What oneDNN and other
    libraries take by themselves is not seen, and what was there before counts to the end, even if the call frees it.
    """
    before = kept_bytes(*roots)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    changes = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    most = level = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        level += change
        most = max(most, level)
    return before + most


def peak_on_cuda(call: Callable[[], Any], reserved: bool) -> int:
    """Bytes by PyTorch's own count: allocated, or with `reserved` what it holds, as CUDA graphs keep all of theirs."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() if reserved else torch.cuda.max_memory_allocated()
