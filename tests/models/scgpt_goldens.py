"""scGPT's goldens: the authors' padded batches as packs, our results as their padded arrays."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import scfm
from scfm.models.scgpt.model import Scgpt
from scfm.models.scgpt.output import ScgptOutput

PAD, CLS = 297, 298
RTOL, ATOL = 1e-4, 2e-5
# The readings of padding by the goldens' tags.
READINGS = {"slow": "plain", "fast": "nested", "flashemu": "flash"}


def close(ours: Tensor, want: Tensor | np.ndarray, *, rtol: float = RTOL, atol: float = ATOL) -> None:
    torch.testing.assert_close(ours.detach(), torch.as_tensor(want), rtol=rtol, atol=atol)


def load(folder: Path, **options) -> Scgpt:
    return scfm.load(folder, dtype="float32", **options)


@dataclass
class PaddedBatch:
    """src, values: (B, L) as the authors' code takes them; tokens: bool (B, L), what is not padding."""

    stored: dict[str, Tensor]
    tokens: Tensor

    @classmethod
    def read(cls, path: Path) -> PaddedBatch:
        with np.load(path, allow_pickle=False) as found:
            stored = {name: torch.from_numpy(found[name]) for name in found.files}
        return cls(stored, stored["src"] != PAD)

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[name]

    def __contains__(self, name: str) -> bool:
        return name in self.stored

    @property
    def packed(self) -> scfm.PackedCells:
        return pack(self["src"], self["values"], self.tokens)

    @property
    def length(self) -> int:
        return self.tokens.shape[1]

    def inputs(self) -> dict[str, Tensor]:
        """What forward takes beside the pack."""
        found = {}
        if "batch_labels" in self:
            found["batch_labels"] = self["batch_labels"]
        if "mod_types" in self:
            found["modalities"] = self["mod_types"][self.tokens]
        return found

    def spread(self, of_tokens: Tensor, of_padding: Tensor) -> Tensor:
        """(T, ...) and (B, ...) as the padded array (B, L, ...)."""
        out = of_padding[:, None].repeat(1, self.length, *[1] * (of_padding.dim() - 1)).detach().clone()
        out[self.tokens] = of_tokens.detach()
        return out


def pack(src: Tensor, values: Tensor, tokens: Tensor) -> scfm.PackedCells:
    return scfm.PackedCells.from_lists(
        [row[keep].tolist() for row, keep in zip(src, tokens, strict=True)],
        [row[keep].tolist() for row, keep in zip(values, tokens, strict=True)],
    )


def forward(model: Scgpt, batch: PaddedBatch, tag: str, **options) -> ScgptOutput:
    """As the golden's tag had it: with gradients, or without."""
    reading = READINGS[tag]
    with torch.set_grad_enabled(reading == "plain"):
        return model.forward(
            batch.packed, padding=reading, padded_length=batch.length, **batch.inputs(), **options
        )
