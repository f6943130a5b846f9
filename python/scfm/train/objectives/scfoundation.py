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

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scfm import _native
from scfm.data.keyed_draws import words_at
from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.nn.performer import KmaxScope
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scfoundation.model import Scfoundation

__all__ = ["HiddenGenes", "down_sample", "hide_genes", "read_depth_loss"]

DEEP_CELL = 1000.0  # counts from which a cell may be down-sampled
DOWN_SAMPLED = 0.5
# Keeps these draws apart from others of the same seed: "hexp", "hoth", "hmas", "hran" and "hdon".
_EXPRESSED, _OTHERS, _MASKED, _RANDOM, _DONOR = (0x68657870, 0x686F7468, 0x686D6173, 0x6872616E, 0x68646F6E)
_ROUNDING = 0.02  # how far a count that was found from its logarithm may be from a whole number, as a share


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
    packed: PackedCells,
    config: ScfoundationConfig,
    *,
    seed: int,
    epoch: int,
    deep_cell: float = DEEP_CELL,
    down_sampled: float = DOWN_SAMPLED,
) -> tuple[PackedCells, PackedCells]:
    """Each cell as the encoder is to see it, T being its real depth, and as it is. Raises InvalidArgumentError.

    packed: of raw counts by the model's tokenizer with any target; the counts are found from its logarithms and S.
    """
    counts, totals = _counts_of(packed, config)
    cell_ids = np.ascontiguousarray(packed.cell_ids.numpy())
    shares = _native.draw_shares(totals, cell_ids, deep_cell, down_sampled, seed, epoch)
    offsets = packed.cu_seqlens.numpy().astype(np.int64)
    positions = packed.token_ids.numpy()
    kept = _native.thin_counts(offsets, positions, counts, cell_ids, shares, seed, epoch)
    cells = np.repeat(np.arange(packed.num_cells), np.diff(offsets))
    left = np.bincount(cells, weights=kept, minlength=packed.num_cells)
    nothing = left <= 1  # that has a depth
    kept, left = np.where(nothing[cells], counts, kept), np.where(nothing, totals, left)
    genes = kept > 0
    cells = cells[genes]
    shown = _with_depths(cells, packed.num_cells)
    tokens = np.empty(shown.num_tokens, dtype=np.int32)
    values = np.empty(shown.num_tokens, dtype=np.float32)
    tokens[shown.genes], values[shown.genes] = positions[genes], np.log1p(kept[genes] / left[cells] * 1e4)
    for depth, place, number in ((totals, 2, config.num_genes), (left, 1, config.num_genes + 1)):
        tokens[shown.offsets[1:] - place], values[shown.offsets[1:] - place] = number, np.log10(depth)
    return _pack(tokens, values, shown.offsets, packed.cell_ids), packed


def hide_genes(
    packed: PackedCells,
    model: Scfoundation,
    *,
    seed: int,
    epoch: int,
    deep_cell: float = DEEP_CELL,
    down_sampled: float = DOWN_SAMPLED,
) -> HiddenGenes:
    """Cells of raw counts, down-sampled and masked; see the head of this file. Raises InvalidArgumentError.

    deep_cell: counts from which a cell may be down-sampled; down_sampled: how often it is.
    """
    config = model.config
    seen, whole = down_sample(
        packed, config, seed=seed, epoch=epoch, deep_cell=deep_cell, down_sampled=down_sampled
    )
    draws = _Draws(packed.cell_ids, seed, epoch)
    tokens, values, cells = _arrays_of(seen)
    genes = np.flatnonzero(tokens < config.num_genes)
    expressed = _Genes(tokens[genes], cells[genes], packed.num_cells)
    from_expressed = draws.choose(expressed.counts, config.value_mask_ratio, _EXPRESSED)
    from_others = draws.choose(config.num_genes - expressed.counts, config.zero_mask_ratio, _OTHERS)
    hidden_tokens = genes[from_expressed.places]
    others = expressed.missing(from_others.cells, from_others.numbers)
    positions = np.concatenate([tokens[hidden_tokens], others])
    of_cell = np.concatenate([from_expressed.cells, from_others.cells])
    entering = np.concatenate([values[hidden_tokens], np.zeros(len(others), dtype=np.float32)])
    order = np.argsort(of_cell * config.vocab_size + positions)
    positions, of_cell, entering = positions[order], of_cell[order], entering[order]
    hidden = np.bincount(of_cell, minlength=packed.num_cells)
    entering = _replaced(entering, hidden, values[genes], expressed, draws, config)
    shown = np.ones(len(tokens), dtype=bool)
    shown[hidden_tokens] = False
    return HiddenGenes(
        shown=_pack(tokens[shown], values[shown], _offsets(cells[shown], packed.num_cells), packed.cell_ids),
        late=_pack(positions, entering, _offsets(of_cell, packed.num_cells), packed.cell_ids),
        cells=torch.from_numpy(of_cell),
        positions=torch.from_numpy(positions.astype(np.int64)),
        targets=torch.from_numpy(_values_at(whole, of_cell, positions, config.vocab_size)),
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


@dataclass(frozen=True)
class _Chosen:
    """places: int64 (N,), among all items of all cells; cells: whose they are; numbers: which of the cell's."""

    places: np.ndarray
    cells: np.ndarray
    numbers: np.ndarray


@dataclass(frozen=True)
class _Draws:
    """Draws of (seed, epoch, cell, purpose)."""

    cell_ids: Tensor
    seed: int
    epoch: int

    def choose(self, counts: np.ndarray, share: float, purpose: int) -> _Chosen:
        """round(share * count) of each cell's items, every set of them equally likely."""
        return self.choose_number(counts, np.rint(share * counts), purpose)

    def choose_number(self, counts: np.ndarray, wanted: np.ndarray, purpose: int) -> _Chosen:
        offsets = np.concatenate([[0], np.cumsum(counts)])
        if offsets[-1] > np.iinfo(np.int32).max:
            raise InvalidArgumentError(
                f"{offsets[-1]:,} genes in one pack are more than 2^31",
                where="packed",
                hint="Give fewer cells.",
            )
        chosen = _native.choose_tokens(
            offsets.astype(np.int32),
            np.ascontiguousarray(self.cell_ids.numpy()),
            np.minimum(wanted, counts).astype(np.int32),
            0,
            self.seed,
            self.epoch,
            purpose,
        )
        places = np.flatnonzero(chosen)
        cells = np.searchsorted(offsets, places, side="right") - 1
        return _Chosen(places, cells, places - offsets[cells])

    def below(self, bounds: np.ndarray, chosen: _Chosen, purpose: int) -> np.ndarray:
        """A whole number from 0 to below the bound for each chosen item, int64."""
        ids = self.cell_ids.numpy()[chosen.cells].astype(np.uint64)
        counter = (chosen.numbers, ids, ids >> np.uint64(32), self.epoch)
        words = words_at(counter, self.seed ^ purpose)
        return ((words.astype(np.uint64) * bounds.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


class _Genes:
    """The expressed genes of all cells: positions, ascending in each cell, cells and their number in each."""

    def __init__(self, positions: np.ndarray, cells: np.ndarray, num_cells: int) -> None:
        self.offsets = _offsets(cells, num_cells)
        self.counts = np.diff(self.offsets)
        # How many genes are missing in front of each expressed one, made ascending over all cells.
        self._far = np.int64(2) ** 32
        missing = positions - (np.arange(len(positions)) - self.offsets[cells])
        self._keys = cells * self._far + missing

    def missing(self, cells: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Positions of the cells' genes that are not expressed, counted by ``numbers`` from 0."""
        before = np.searchsorted(self._keys, cells * self._far + numbers, side="right") - self.offsets[cells]
        found: np.ndarray = numbers + before
        return found


def _replaced(
    entering: np.ndarray,
    hidden: np.ndarray,
    amounts: np.ndarray,
    expressed: _Genes,
    draws: _Draws,
    config: ScfoundationConfig,
) -> np.ndarray:
    """What the decoder gets instead: mostly the mask value, sometimes that of another expressed gene of the cell."""
    entering = entering.copy()
    masked = draws.choose(hidden, config.replace_ratio, _MASKED)
    entering[masked.places] = config.mask_value
    rest = np.ones(len(entering), dtype=bool)
    rest[masked.places] = False
    left = np.flatnonzero(rest)
    num_left = hidden - np.bincount(masked.cells, minlength=len(hidden))
    random = draws.choose_number(
        num_left, np.where(expressed.counts > 0, np.rint(config.random_ratio * hidden), 0), _RANDOM
    )
    donors = draws.below(expressed.counts[random.cells], random, _DONOR)
    entering[left[random.places]] = amounts[expressed.offsets[random.cells] + donors]
    return entering


def _values_at(packed: PackedCells, cells: np.ndarray, positions: np.ndarray, vocab_size: int) -> np.ndarray:
    """float32 (N,): the pack's value of these positions of its cells, 0 where they are no tokens."""
    tokens, values, owners = _arrays_of(packed)
    keys, wanted = owners * vocab_size + tokens, cells * vocab_size + positions
    places = np.minimum(np.searchsorted(keys, wanted), max(len(keys) - 1, 0))
    found: np.ndarray = np.where(keys[places] == wanted, values[places], np.float32(0.0))
    return found


def _arrays_of(packed: PackedCells) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions and values of all tokens, and whose they are."""
    assert packed.values is not None
    cells = np.repeat(np.arange(packed.num_cells), packed.lengths.numpy())
    return packed.token_ids.numpy().astype(np.int64), packed.values.numpy(), cells


@dataclass(frozen=True)
class _Layout:
    """Cells of genes with two depths behind each: offsets (C + 1,), and where the genes stand."""

    offsets: np.ndarray
    genes: np.ndarray
    num_tokens: int


def _with_depths(cells: np.ndarray, num_cells: int) -> _Layout:
    offsets = _offsets(cells, num_cells) + 2 * np.arange(num_cells + 1)
    return _Layout(offsets, np.arange(len(cells)) + 2 * cells, int(offsets[-1]))


def _offsets(cells: np.ndarray, num_cells: int) -> np.ndarray:
    """int64 (num_cells + 1,): where each cell's items begin. cells: ascending, whose each item is."""
    counts = np.bincount(cells, minlength=num_cells)
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)


def _pack(tokens: np.ndarray, values: np.ndarray, offsets: np.ndarray, cell_ids: Tensor) -> PackedCells:
    return PackedCells(
        token_ids=torch.from_numpy(tokens.astype(np.int32)),
        values=torch.from_numpy(values.astype(np.float32)),
        cu_seqlens=torch.from_numpy(offsets.astype(np.int32)),
        cell_ids=cell_ids,
    )
