"""Peaks by the names that drivers give, unknown where nobody said; a measured one is what a product reaches."""

from __future__ import annotations

import pytest
import torch

from scfm.errors import InvalidArgumentError
from scfm.train.cost.device_peaks import DEVICES, device_sheet, measured_peak_flops, peak_flops

NAMES = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H200": 989e12,
    "NVIDIA GH200 480GB": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GB200": 2500e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
    "NVIDIA A10": 125e12,
    "NVIDIA A10G": None,
    "NVIDIA GeForce RTX 4090": 165.2e12,
    "NVIDIA GeForce RTX 4090 Laptop GPU": None,
    "Tesla V100-SXM2-32GB": None,
    "AMD Instinct MI300X": 1307.4e12,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_drivers_names(name: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = torch.device("cuda", 0)
    assert peak_flops(device, torch.bfloat16) == NAMES[name]
    assert (peak_flops(device, torch.float32) is None) == (NAMES[name] is None)
    assert peak_flops(device, torch.float64) is None


def test_a_processor_has_no_sheet() -> None:
    assert peak_flops(torch.device("cpu"), torch.float32) is None


def test_sheets_by_their_short_names() -> None:
    assert device_sheet("h100").bfloat16 == 989e12 and device_sheet("A100-40GB").memory == 40 * 10**9
    assert device_sheet("rtx 4090").name == "RTX-4090"
    assert len({sheet.name for sheet in DEVICES}) == len(DEVICES)
    with pytest.raises(InvalidArgumentError, match=r"K80.*H100"):
        device_sheet("K80")


def test_a_measured_peak_is_a_products_speed() -> None:
    assert 1e8 < measured_peak_flops(torch.float32, size=128, rounds=2) < 1e15
