"""What a number was measured on: processor, memory, versions and commit.

Holds nothing that names a person or a place: no host name and no path.
"""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from asr.common.provenance import commit

PACKAGES = ("numpy", "torch", "onnxruntime")
FLAGS = (  # what decides how fast a model runs: vectors, bf16, int8 products
    "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "avx_vnni", "amx_bf16", "amx_int8",
    "asimd", "asimdhp", "asimddp", "bf16", "i8mm", "sve",
)  # fmt: skip


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, system and versions, JSON types."""
    model, flags = _processor()
    return {
        "processor": model,
        "flags": [flag for flag in FLAGS if flag in flags],
        "cores": usable_cores(),
        "memory": _memory(),
        "system": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def provenance(command: str, seed: int | None = None) -> dict[str, Any]:
    """What every file of figures says of its making; no seed where nothing is drawn at random."""
    return {"command": command, "commit": commit(), "seed": seed, "machine": describe_machine()}


def busy_cores() -> float:
    """How many cores other work kept busy in the last minute; 0 where it is not known."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else 0.0


def busy_note(load: float) -> str:
    """A warning where other work disturbs a measurement of speed, else ''."""
    if load <= 0.25 * usable_cores():
        return ""
    return (
        f"note: the machine was busy before (load {load:.1f} on {usable_cores()} cores): "
        "speeds are slower than those of an idle one"
    )


def default_threads() -> int:
    """The cores that are idle but for one, at least 1: what a command uses if nobody says.

    Threads that compute together wait for the last of them, spinning. Where one is kept from its
    core by other work, all stand still: with as many threads as cores, on two that were shared,
    int8 took a tenth longer (ONNX Runtime) or over ten times as long (PyTorch)
    (experiments/speed/threads.json, threads_onnx.json). A core left free costs the share of one.
    """
    return max(1, usable_cores() - max(1, round(busy_cores())))


def usable_cores() -> int:
    """Processor cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> tuple[str, set[str]]:
    """Model name and feature flags; on Linux from /proc/cpuinfo, in x86's or ARM's words."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or platform.machine(), set()
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    model = fields.get("model name") or fields.get("model") or platform.machine()
    return model, set(fields.get("flags", fields.get("features", "")).split())


def _memory() -> int:
    """Bytes of main memory, 0 where it is not known."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 0


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
