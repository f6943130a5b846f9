"""Peaks of the hardware that MFU and cost are measured against: dense products, from the vendors' data sheets.

Data sheets often print the figure with 2:4 sparsity, which is twice the dense one that stands here. Sources: NVIDIA's
data sheets of A100 (2021), A10, A40, L4, L40, L40S, H100 (SXM, PCIe, NVL), H200 (SXM, NVL), DGX/HGX B200 and GB200; the
whitepapers "Ada GPU architecture" (RTX 4090) and "GA102" (RTX 3090, with float32 accumulation); AMD's data sheets of
MI250X (per die) and MI300X. A device that is not listed has no peak: its MFU is unknown rather than wrong.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass

import torch

from scfm.errors import InvalidArgumentError

__all__ = ["DEVICES", "DeviceSheet", "device_sheet", "measured_peak_flops", "peak_flops"]

_GB = 10**9


@dataclass(frozen=True)
class DeviceSheet:
    """bfloat16, float32: FLOP/s of dense products, tensor cores in bfloat16, plain arithmetic in float32 (torch's
    default: no TF32). memory: bytes. pattern: what the driver's name of the device has to match.
    """

    name: str
    bfloat16: float
    float32: float
    memory: int
    pattern: str


# The first pattern that matches counts, so the special ones come first.
DEVICES = (
    DeviceSheet("GB200", 2500e12, 80e12, 186 * _GB, r"GB200"),
    DeviceSheet("B200", 2250e12, 75e12, 180 * _GB, r"B200"),
    DeviceSheet("H200-NVL", 835e12, 60e12, 141 * _GB, r"H200.*NVL"),
    DeviceSheet("H200", 989e12, 67e12, 141 * _GB, r"H200"),
    DeviceSheet("GH200", 989e12, 67e12, 96 * _GB, r"GH200"),
    DeviceSheet("H100-NVL", 835e12, 60e12, 94 * _GB, r"H100.*NVL"),
    DeviceSheet("H100-PCIe", 756e12, 51e12, 80 * _GB, r"H100.*PCIe"),
    DeviceSheet("H100", 989e12, 67e12, 80 * _GB, r"H100"),
    DeviceSheet("A100-40GB", 312e12, 19.5e12, 40 * _GB, r"A100.*40GB"),
    DeviceSheet("A100", 312e12, 19.5e12, 80 * _GB, r"A100"),
    DeviceSheet("L40S", 362e12, 91.6e12, 48 * _GB, r"L40S"),
    DeviceSheet("L40", 181e12, 90.5e12, 48 * _GB, r"L40\b"),
    DeviceSheet("L4", 121e12, 30.3e12, 24 * _GB, r"L4\b"),
    DeviceSheet("A40", 149.7e12, 37.4e12, 48 * _GB, r"A40\b"),
    DeviceSheet("A10", 125e12, 31.2e12, 24 * _GB, r"A10\b"),
    DeviceSheet("RTX-4090", 165.2e12, 82.6e12, 24 * _GB, r"RTX 4090\b(?! Laptop)"),
    DeviceSheet("RTX-3090", 71e12, 35.6e12, 24 * _GB, r"RTX 3090\b(?! Ti)"),
    DeviceSheet("MI300X", 1307.4e12, 163.4e12, 192 * _GB, r"MI300X"),
    DeviceSheet("MI250X", 191.5e12, 23.9e12, 64 * _GB, r"MI250X"),
)


def device_sheet(name: str) -> DeviceSheet:
    """The sheet under its short name, any case. Raises InvalidArgumentError listing those that there are."""
    for sheet in DEVICES:
        if sheet.name.lower() == name.strip().lower().replace(" ", "-"):
            return sheet
    raise InvalidArgumentError(
        f"{name!r} is not in the table; known are {', '.join(sheet.name for sheet in DEVICES)}", where="gpu"
    )


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """FLOP/s of one device for products in float32 or bfloat16; None where the table does not know it, as any CPU."""
    if device.type != "cuda" or dtype not in (torch.float32, torch.bfloat16):
        return None
    found = torch.cuda.get_device_name(device)
    for sheet in DEVICES:
        if re.search(sheet.pattern, found):
            return sheet.bfloat16 if dtype == torch.bfloat16 else sheet.float32
    return None


def measured_peak_flops(dtype: torch.dtype, *, size: int = 2048, rounds: int = 6) -> float:
    """FLOP/s of this CPU: the best of some products of two (size, size) matrices with torch's threads as they are."""
    from scfm.ops.products import fast_float32

    a, b = (torch.ones(size, size, dtype=dtype) for _ in range(2))
    best = float("inf")
    with torch.no_grad(), fast_float32(torch.device("cpu")):
        for _ in range(rounds):
            start = time.perf_counter()
            torch.mm(a, b)
            best = min(best, time.perf_counter() - start)
    return 2.0 * size**3 / best
