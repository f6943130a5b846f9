"""scFoundation's objective: hidden genes of a possibly shallower cell, predicted at the depth that the cell really has.

Of deep cells (1,000 counts or more) every second one is down-sampled: share ~ Beta(2, 2), x' ~ Binomial(x, share). The
encoder sees ln(1 + CP10k) of x' with S = log10(total of x') and T = log10(total of x); 30 % of the expressed genes and
3 % of the others are hidden from it. In the decoder 8 of 10 hidden genes bear the mask value, one a random value and
one what it had. The loss is the squared error of the hidden genes against ln(1 + CP10k) of x.

Everything is drawn by (seed, epoch, cell), never by batch or order. The authors released no code for this: the shares
are those of the released configuration, the rest is their paper's text; "a random value" is read here as the value of
another expressed gene of the cell. Source: Hao et al. 2024.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scfm import _native
from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.nn.performer import KmaxScope
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scfoundation.model import Scfoundation

__all__ = ["HiddenGenes", "down_sample", "hide_genes", "read_depth_loss"]

DEEP_CELL = 1000.0  # counts from which a cell may be down-sampled
DOWN_SAMPLED = 0.5
_PURPOSE = 0x68696465  # "hide": keeps these draws apart from others of the seed
_ROUNDING = 0.02  # how far a count that was found from its logarithm may be from a whole number, as a share
_MASK64 = 2**64 - 1


@dataclass(frozen=True)
class HiddenGenes:
    """Cells with some genes hidden. shown: what the encoder sees; late: what the decoder sees of the hidden genes.

    cells, positions: int64 (M,), the hidden genes, cells counted in the pack; targets: float32 (M,), ln(1 + CP10k) of
    the cell before down-sampling.
    """

    shown: PackedCells
    late: PackedCells
    cells: Tensor
    positions: Tensor
    targets: Tensor


def down_sample(
    packed: PackedCells, config: ScfoundationConfig, *, seed: int, epoch: int
) -> tuple[PackedCells, PackedCells]:
    """Each cell as the encoder is to see it, T being its real depth, and as it is. Raises InvalidArgumentError.

    packed: of raw counts by the model's tokenizer with any target; the counts are found from its logarithms and S.
    """
    counts, totals = _counts_of(packed, config)
    cell_ids = np.ascontiguousarray(packed.cell_ids.numpy())
    shares = _native.draw_shares(totals, cell_ids, DEEP_CELL, DOWN_SAMPLED, seed, epoch)
    offsets = packed.cu_seqlens.numpy().astype(np.int64)
    positions = packed.token_ids.numpy()
    thinned = _native.thin_counts(offsets, positions, counts, cell_ids, shares, seed, epoch)
    cells: list[tuple[np.ndarray, np.ndarray]] = []
    for cell, (start, stop) in enumerate(itertools.pairwise(offsets.tolist())):
        of_cell = slice(start, stop)
        kept = thinned[of_cell]
        total = kept.sum()
        if total <= 1:  # nothing is left that has a depth
            kept, total = counts[of_cell], totals[cell]
        genes = kept > 0
        depths = np.log10([totals[cell], total])
        tokens = [positions[of_cell][genes], np.array([config.num_genes, config.num_genes + 1])]
        values = [np.log1p(kept[genes] / total * 1e4), depths]
        cells.append((np.concatenate(tokens), np.concatenate(values)))
    return _pack(cells, packed.cell_ids), packed


def hide_genes(packed: PackedCells, model: Scfoundation, *, seed: int, epoch: int) -> HiddenGenes:
    """Cells of raw counts, down-sampled and masked; see the head of this file. Raises InvalidArgumentError."""
    config = model.config
    seen, whole = down_sample(packed, config, seed=seed, epoch=epoch)
    shown: list[tuple[np.ndarray, np.ndarray]] = []
    late: list[tuple[np.ndarray, np.ndarray]] = []
    targets: list[np.ndarray] = []
    for cell in range(packed.num_cells):
        positions, values = _cell_of(seen, cell)
        hidden, entering = _hide_one(positions, values, config, seed, epoch, int(packed.cell_ids[cell]))
        kept = ~np.isin(positions, hidden)
        shown.append((positions[kept], values[kept]))
        late.append((hidden, entering))
        real = np.zeros(config.vocab_size, dtype=np.float32)
        places, real_values = _cell_of(whole, cell)
        real[places] = real_values
        targets.append(real[hidden])
    return HiddenGenes(
        shown=_pack(shown, packed.cell_ids),
        late=_pack(late, packed.cell_ids),
        cells=torch.from_numpy(np.repeat(np.arange(packed.num_cells), [len(one) for one, _ in late])),
        positions=torch.from_numpy(_joined([one for one, _ in late], np.int64)),
        targets=torch.from_numpy(_joined(targets, np.float32)),
    )


def read_depth_loss(model: Scfoundation, hidden: HiddenGenes, *, kmax_scope: KmaxScope = "cell") -> Tensor:
    """Mean squared error of the hidden genes, in (ln(1 + CP10k))^2; 0 where none is hidden."""
    prediction = model.forward(hidden.shown, late=hidden.late, kmax_scope=kmax_scope).prediction
    device = prediction.device
    found = prediction[hidden.cells.to(device), hidden.positions.to(device)].float()
    errors = (found - hidden.targets.to(device)).square()
    return errors.mean() if len(errors) else prediction.sum() * 0.0


def _counts_of(packed: PackedCells, config: ScfoundationConfig) -> tuple[np.ndarray, np.ndarray]:
    """Each token's count (0 for depths) and each cell's total."""
    if packed.values is None:
        raise InvalidArgumentError("has no values", where="packed")
    tokens, values = packed.token_ids.numpy(), packed.values.numpy().astype(np.float64)
    ends = packed.cu_seqlens[1:].numpy().astype(np.int64)
    lengths = packed.lengths.numpy()
    has_depth = lengths > 0
    has_depth[has_depth] = tokens[ends[has_depth] - 1] == config.num_genes + 1
    if not has_depth.all():
        raise InvalidArgumentError(
            f"cell {int(np.flatnonzero(~has_depth)[0])} does not end with its read depth S", where="packed"
        )
    totals = np.rint(10.0 ** values[ends - 1])
    found = np.expm1(values) * np.repeat(totals, lengths) / 1e4
    counts = np.rint(found)
    counts[tokens >= config.num_genes] = 0.0
    wrong = (np.abs(found - counts) > _ROUNDING * np.maximum(counts, 1.0)) & (tokens < config.num_genes)
    if wrong.any():
        cell = int(np.searchsorted(ends, int(np.flatnonzero(wrong)[0]), side="right"))
        raise InvalidArgumentError(
            f"cell {cell} holds no ln(1 + CP10k) of whole counts, so it cannot be down-sampled",
            where="packed",
            hint="Tokenize raw counts with the model's own tokenizer.",
        )
    return counts, totals


def _hide_one(
    positions: np.ndarray,
    values: np.ndarray,
    config: ScfoundationConfig,
    seed: int,
    epoch: int,
    cell_id: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Hidden positions, ascending, and the values that they have for the decoder."""
    genes = positions < config.num_genes
    expressed, amounts = positions[genes], values[genes]
    others = np.setdiff1d(np.arange(config.num_genes), expressed)
    stream = np.random.Philox(
        key=np.array([seed & _MASK64, _PURPOSE], dtype=np.uint64),
        counter=np.array([0, cell_id & _MASK64, epoch & _MASK64, 0], dtype=np.uint64),
    )
    from_expressed = _order(stream, len(expressed))[: round(config.value_mask_ratio * len(expressed))]
    from_others = _order(stream, len(others))[: round(config.zero_mask_ratio * len(others))]
    hidden = np.concatenate([expressed[from_expressed], others[from_others]])
    entering = np.concatenate([amounts[from_expressed], np.zeros(len(from_others), np.float32)])
    order = _order(stream, len(hidden))
    num_masked, num_random = (
        round(share * len(hidden)) for share in (config.replace_ratio, config.random_ratio)
    )
    donors = stream.random_raw(len(hidden)) % np.uint64(max(len(amounts), 1))
    entering[order[:num_masked]] = config.mask_value
    random = order[num_masked : num_masked + num_random]
    if len(amounts):
        entering[random] = amounts[donors[random].astype(np.int64)]
    ascending = np.argsort(hidden)
    return hidden[ascending].astype(np.int64), entering[ascending].astype(np.float32)


def _order(stream: np.random.Philox, count: int) -> np.ndarray:
    """0..count-1 in an order where any is as likely as any other."""
    return np.argsort(stream.random_raw(count), kind="stable")


def _cell_of(packed: PackedCells, cell: int) -> tuple[np.ndarray, np.ndarray]:
    assert packed.values is not None
    span = slice(int(packed.cu_seqlens[cell]), int(packed.cu_seqlens[cell + 1]))
    return packed.token_ids[span].numpy().astype(np.int64), packed.values[span].numpy()


def _pack(cells: list[tuple[np.ndarray, np.ndarray]], cell_ids: Tensor) -> PackedCells:
    lengths = np.array([0, *(len(tokens) for tokens, _ in cells)], dtype=np.int64)
    return PackedCells(
        token_ids=torch.from_numpy(_joined([tokens for tokens, _ in cells], np.int32)),
        values=torch.from_numpy(_joined([values for _, values in cells], np.float32)),
        cu_seqlens=torch.from_numpy(np.cumsum(lengths).astype(np.int32)),
        cell_ids=cell_ids,
    )


def _joined(parts: list[np.ndarray], dtype: type[np.generic]) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype=dtype), *parts]).astype(dtype)
