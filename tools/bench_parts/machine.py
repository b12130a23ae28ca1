"""The machine that the figures are from, in words."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def describe() -> dict[str, Any]:
    """Processor, its caches and instruction set, memory, system, compiler and library versions."""
    found = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "caches": caches(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "compiler": _compiler(),
        "versions": {name: _version(name) for name in ("torch", "torchvision", "onnxruntime", "numpy")},
    }
    if torch.cuda.is_available():
        found["gpu"] = _gpu()
    return found


def _gpu() -> str:
    """Name, memory, multiprocessors and CUDA version of the first device."""
    of = torch.cuda.get_device_properties(0)
    return f"{of.name}, {of.total_memory / 2**30:.0f} GiB, {of.multi_processor_count} SMs, CUDA {torch.version.cuda}"


def in_a_line(machine: dict[str, Any]) -> str:
    caches_text = ", ".join(f"{name} {size}" for name, size in machine["caches"].items())
    gpu = f"{machine['gpu']}; " if "gpu" in machine else ""
    return (
        f"{gpu}{machine['processor']} ({machine['instruction_set']}, {machine['cores']} cores; {caches_text}), "
        f"{machine['memory_gib']} GiB, {machine['system']}, Python {machine['python']}, {machine['compiler']}, "
        + ", ".join(f"{name} {number}" for name, number in machine["versions"].items() if number)
    )


def caches() -> dict[str, str]:
    """Size of each data cache of the first core, as the kernel writes it ("1024K"); empty where it does not."""
    found = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            kind, level, size = ((folder / name).read_text().strip() for name in ("type", "level", "size"))
        except OSError:
            continue
        if kind != "Instruction":
            found[f"L{level}"] = size
    return found


def _processor() -> str:
    """The model, and the family, which tells apart what a virtual machine gives one name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    facts = dict(_pair(line) for line in lines)
    if "model name" not in facts:
        return platform.processor() or platform.machine()
    return f"{facts['model name']} family {facts.get('cpu family', '?')} model {facts.get('model', '?')}"


def _pair(line: str) -> tuple[str, str]:
    key, _, value = line.partition(":")
    return key.strip(), value.strip()


def _memory_gib() -> int | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (ValueError, OSError, AttributeError):
        return None


def _compiler() -> str:
    command = [os.environ.get("CXX", "c++"), "--version"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "no C++ compiler"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
