"""Random projections of FAVOR+: rows orthogonal in blocks, as long as Gaussian rows would be.

Blocks of D rows are Q^T of a QR of a Gaussian (D, D) matrix; each row is then scaled by the length of a fresh Gaussian
row. Draws are keyed, never taken from a global generator: the first by (seed, layer), a redraw by (seed, layer, the
matrix it replaces), so that any rank, and a training that goes on from a checkpoint, draws the same.
Source: gaussian_orthogonal_random_matrix of performer_pytorch; Choromanski et al. 2021.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor


def default_num_features(head_dim: int) -> int:
    """The original's number of features for a head: int(D ln D)."""
    return int(head_dim * math.log(head_dim))


def draw_projection(num_features: int, head_dim: int, *, seed: int, layer: int, key: bytes = b"") -> Tensor:
    """float32 (num_features, head_dim). Equal seeds, layers and keys give equal matrices."""
    generator = torch.Generator().manual_seed(_key_of(seed, layer, key))
    blocks = []
    for start in range(0, num_features, head_dim):
        square = torch.randn(head_dim, head_dim, generator=generator)
        orthogonal, _ = torch.linalg.qr(square)
        blocks.append(orthogonal.T[: num_features - start])
    lengths = torch.randn(num_features, head_dim, generator=generator).norm(dim=1, keepdim=True)
    matrix: Tensor = torch.cat(blocks) * lengths
    return matrix


def next_projection(current: Tensor, *, seed: int, layer: int) -> Tensor:
    """The matrix that follows ``current`` in training."""
    content = current.detach().cpu().contiguous().numpy().tobytes()
    return draw_projection(*current.shape, seed=seed, layer=layer, key=content)


def _key_of(seed: int, layer: int, key: bytes) -> int:
    digest = hashlib.sha256(f"projection {seed} {layer} ".encode() + key).digest()
    return int.from_bytes(digest[:8], "little") >> 1
