"""What one core can do at most, measured: multiply-adds a second, and bytes a second from its caches."""

import ctypes
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_parts.machine import caches
from bench_parts.peers import Left

SOURCE = r"""
#if defined(__AVX512F__)
typedef float V __attribute__((vector_size(64)));
#elif defined(__AVX__)
typedef float V __attribute__((vector_size(32)));
#else
typedef float V __attribute__((vector_size(16)));
#endif
enum { CHAINS = 12 };  // enough to hide the latency of two units, few enough for sixteen registers

extern "C" int lanes() { return sizeof(V) / sizeof(float); }

// rounds * CHAINS multiply-adds of vectors, none of which waits for another
extern "C" float multiply_add(long rounds, float a, float b) {
    V x = {}, y = {}, sums[CHAINS];
    x += a; y += b;
    for (int i = 0; i < CHAINS; i++) sums[i] = y * (float)i;
    for (long round = 0; round < rounds; round++) {
#pragma GCC unroll 12
        for (int i = 0; i < CHAINS; i++) sums[i] = sums[i] * x + y;
    }
    float total = 0;
    for (int i = 0; i < CHAINS; i++) total += sums[i][0];
    return total;
}

// reads `vectors` (a multiple of CHAINS) from memory, `rounds` times
extern "C" float read(const float* memory, long vectors, long rounds) {
    const V* from = (const V*)memory;
    V sums[CHAINS];
    for (int i = 0; i < CHAINS; i++) sums[i] = V{};
    for (long round = 0; round < rounds; round++) {
        for (long n = 0; n < vectors; n += CHAINS) {
#pragma GCC unroll 12
            for (int i = 0; i < CHAINS; i++) sums[i] += from[n + i];
        }
        asm volatile("" ::: "memory");
    }
    float total = 0;
    for (int i = 0; i < CHAINS; i++) total += sums[i][0];
    return total;
}
"""
CHAINS = 12
BYTES_A_MAC = 4
"""What a multiply-add of the sparse kernel reads from L2: one float of the activations; the weight is in a register."""


def measured_bounds(threads: int) -> dict[str, float]:
    """GMAC/s at peak, and GB/s from L1 and L2, of `threads` cores together. Raises Left where nothing compiles."""
    with tempfile.TemporaryDirectory() as folder:
        library = _built(Path(folder))
        lanes = library.lanes()
        rounds = 2_000_000
        peak = _rate(lambda: library.multiply_add(rounds, 0.5, 0.25), threads, rounds * CHAINS * lanes)
        found = {"peak_gmacs": peak / 1e9}
        for level, size in caches().items():
            if level in ("L1", "L2"):
                share = int(size.rstrip("KM")) * (2**20 if size.endswith("M") else 2**10) // 2
                found[f"{level}_gbs"] = _bandwidth(library, share, lanes, threads) / 1e9
    if "L2_gbs" in found:
        found["l2_gmacs"] = found["L2_gbs"] / BYTES_A_MAC
    return found


def _built(folder: Path) -> ctypes.CDLL:
    source, target = folder / "bounds.cpp", folder / "bounds.so"
    source.write_text(SOURCE)
    native = "-mcpu=native" if os.uname().machine in ("aarch64", "arm64") else "-march=native"
    options = ["-O3", native, "-ffast-math", "-shared", "-fPIC"]
    command = [os.environ.get("CXX", "c++"), *options, str(source), "-o", str(target)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Left(f"no C++ compiler: {error}") from error
    if done.returncode:
        raise Left(f"the bounds do not compile: {done.stderr.strip().splitlines()[0]}")
    library = ctypes.CDLL(str(target))
    library.multiply_add.argtypes = [ctypes.c_long, ctypes.c_float, ctypes.c_float]
    library.read.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_long]
    library.multiply_add.restype = library.read.restype = ctypes.c_float
    return library


def _bandwidth(library: ctypes.CDLL, size: int, lanes: int, threads: int) -> float:
    import torch

    vectors = size // (4 * lanes * CHAINS) * CHAINS
    rounds = max(1, 2**31 // (4 * lanes * vectors))
    buffers = [torch.zeros(vectors * lanes + 16) for _ in range(threads)]
    starts = [-(-buffer.data_ptr() // 64) * 64 for buffer in buffers]  # as aligned as a vector has to be
    calls = iter(starts * 100)
    return _rate(lambda: library.read(next(calls), vectors, rounds), threads, 4 * lanes * vectors * rounds)


def _rate(call: Callable[[], Any], threads: int, amount: int, repeats: int = 5) -> float:
    """The greatest amount a second of processor time, summed over threads at once (ctypes lets them run)."""

    def timed(_: int) -> float:
        start = time.thread_time()
        call()
        return amount / (time.thread_time() - start)

    with ThreadPoolExecutor(threads) as pool:
        return max(sum(pool.map(timed, range(threads))) for _ in range(repeats))
