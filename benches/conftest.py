"""What the result files say of the machine: its processor, not its name."""

from __future__ import annotations

from typing import Any


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    for name in ("node", "release"):
        machine_info.pop(name, None)
    cpu = machine_info.get("cpu", {})
    flags = set(cpu.pop("flags", []))
    cpu["simd"] = sorted(flags & {"avx2", "fma", "avx512f", "avx512bw", "avx512_bf16", "amx_bf16"})
