"""PackedCells on their way to another device."""

from __future__ import annotations

import pytest
import torch

from scfm import PackedCells


def test_offsets_moved_in_inference_mode_tell_when_they_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is worked out of them once for all layers is kept on them, which inference tensors do not allow."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())  # a move is a copy
    with torch.inference_mode():
        chosen = PackedCells.from_lists([[1, 2], [3]]).select([1, 0])
        moved = chosen.to("a device")
    assert chosen.cu_seqlens.is_inference()
    assert not moved.cu_seqlens.is_inference()
    assert moved.to_lists() == [[3], [1, 2]]
