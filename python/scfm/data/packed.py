"""Packed cells: tokens of many cells end to end, without padding.

Cell ``c`` owns tokens ``cu_seqlens[c] : cu_seqlens[c + 1]``. Everything between the tokenizer and the model's
last layer works on this one layout, so no batch ever computes a padding position.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from scfm.errors import InvalidArgumentError


@dataclass(frozen=True)
class PackedCells:
    """Tokens of ``C`` cells, ``T`` in all.

    token_ids: int32 (T,); values: float32 (T,) or None; cu_seqlens: int32 (C + 1,), starting at 0;
    cell_ids: int64 (C,), each cell's row in the source it was tokenized from.
    Raises InvalidArgumentError when shapes, dtypes or offsets contradict each other.
    """

    token_ids: Tensor
    values: Tensor | None
    cu_seqlens: Tensor
    cell_ids: Tensor

    def __post_init__(self) -> None:
        _expect(self.token_ids, "token_ids", torch.int32)
        _expect(self.cu_seqlens, "cu_seqlens", torch.int32)
        _expect(self.cell_ids, "cell_ids", torch.int64)
        if self.values is not None:
            _expect(self.values, "values", torch.float32)
            if self.values.shape != self.token_ids.shape:
                raise InvalidArgumentError(
                    f"values has {self.values.numel()} entries, token_ids {self.token_ids.numel()}",
                    where="PackedCells",
                )
        if self.cu_seqlens.numel() != self.cell_ids.numel() + 1:
            raise InvalidArgumentError(
                f"cu_seqlens has {self.cu_seqlens.numel()} entries; {self.cell_ids.numel()} cells "
                f"need {self.cell_ids.numel() + 1}",
                where="PackedCells",
            )
        lengths = self.cu_seqlens.diff()
        if int(self.cu_seqlens[0]) != 0 or int(self.cu_seqlens[-1]) != self.token_ids.numel():
            raise InvalidArgumentError(
                f"cu_seqlens runs from {int(self.cu_seqlens[0])} to {int(self.cu_seqlens[-1])}; "
                f"expected 0 to {self.token_ids.numel()}",
                where="PackedCells",
            )
        if lengths.numel() and int(lengths.min()) < 0:
            cell = int((lengths < 0).nonzero()[0])
            raise InvalidArgumentError(f"cu_seqlens decreases at cell {cell}", where="PackedCells")

    @classmethod
    def from_lists(
        cls, token_ids: Sequence[Sequence[int]], values: Sequence[Sequence[float]] | None = None
    ) -> PackedCells:
        """Pack lists of tokens, one list a cell; cells are numbered 0..C-1."""
        for name, lists in (("token_ids", token_ids), ("values", values)):
            if lists is not None and not (
                isinstance(lists, Sequence | np.ndarray)
                and all(isinstance(cell, Sequence | np.ndarray | Tensor) for cell in lists)
            ):
                raise InvalidArgumentError(
                    f"{name} must be a list of lists, one a cell", where="PackedCells.from_lists"
                )
        if values is not None:
            if len(values) != len(token_ids):
                raise InvalidArgumentError(
                    f"{len(token_ids)} cells of tokens and {len(values)} of values",
                    where="PackedCells.from_lists",
                )
            for cell, (tokens, numbers) in enumerate(zip(token_ids, values, strict=True)):
                if len(tokens) != len(numbers):
                    raise InvalidArgumentError(
                        f"cell {cell} has {len(tokens)} tokens and {len(numbers)} values",
                        where="PackedCells.from_lists",
                    )
        lengths = np.fromiter((len(cell) for cell in token_ids), dtype=np.int64, count=len(token_ids))
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths)])
        if cu_seqlens[-1] > np.iinfo(np.int32).max:
            raise InvalidArgumentError(f"{cu_seqlens[-1]} tokens do not fit one pack of 2^31")
        return cls(
            token_ids=_flatten(token_ids, np.int32),
            values=None if values is None else _flatten(values, np.float32),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            cell_ids=torch.arange(len(token_ids), dtype=torch.int64),
        )

    @property
    def num_cells(self) -> int:
        return self.cell_ids.numel()

    @property
    def num_tokens(self) -> int:
        return self.token_ids.numel()

    @property
    def lengths(self) -> Tensor:
        """Tokens of each cell, int32 (C,)."""
        return self.cu_seqlens.diff()

    def select(self, cells: Tensor | np.ndarray | Sequence[int] | slice) -> PackedCells:
        """The given cells, in the given order (positions in this pack, not ``cell_ids``)."""
        if isinstance(cells, slice):
            chosen = torch.arange(self.num_cells)[cells]
        else:
            given = np.asarray(cells)
            if given.dtype == bool and given.shape != (self.num_cells,):
                raise InvalidArgumentError(
                    f"a mask of shape {given.shape}; the pack has {self.num_cells} cells",
                    where="PackedCells.select",
                )
            if given.ndim != 1 or (given.size and given.dtype.kind not in "biu"):
                raise InvalidArgumentError(
                    f"cells of {given.ndim} dimensions and dtype {given.dtype}; expected positions or a mask",
                    where="PackedCells.select",
                )
            chosen = torch.as_tensor(np.flatnonzero(given) if given.dtype == bool else given.astype(np.int64))
        chosen = chosen.to(torch.int64)
        if chosen.numel() and (int(chosen.min()) < 0 or int(chosen.max()) >= self.num_cells):
            raise InvalidArgumentError(
                f"cells reach from {int(chosen.min())} to {int(chosen.max())}; the pack has {self.num_cells}",
                where="PackedCells.select",
            )
        lengths = self.lengths[chosen].numpy()
        cu_seqlens = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if cu_seqlens[-1] > np.iinfo(np.int32).max:
            raise InvalidArgumentError(
                f"{cu_seqlens[-1]} tokens do not fit one pack of 2^31", where="PackedCells.select"
            )
        # 32-bit positions and index_select: several times faster than torch's repeat_interleave and indexing.
        shifts = self.cu_seqlens[:-1][chosen].numpy() - cu_seqlens[:-1]
        places = np.repeat(shifts.astype(np.int32), lengths)
        places += np.arange(len(places), dtype=np.int32)
        positions = torch.from_numpy(places)
        return PackedCells(
            token_ids=self.token_ids.index_select(0, positions),
            values=None if self.values is None else self.values.index_select(0, positions),
            cu_seqlens=torch.from_numpy(cu_seqlens.astype(np.int32)),
            cell_ids=self.cell_ids[chosen],
        )

    def to(self, device: torch.device | str) -> PackedCells:
        # Tensors of inference mode do not tell when they are changed, so GPU kernels could not keep on the offsets
        # what they work out of them once for all layers.
        with torch.inference_mode(False):
            return PackedCells(
                token_ids=self.token_ids.to(device),
                values=None if self.values is None else self.values.to(device),
                cu_seqlens=self.cu_seqlens.to(device),
                cell_ids=self.cell_ids.to(device),
            )

    def to_lists(self) -> list[list[int]]:
        """Tokens as Python lists, one a cell."""
        bounds = self.cu_seqlens.tolist()
        tokens = self.token_ids.tolist()
        return [tokens[start:end] for start, end in itertools.pairwise(bounds)]


def concatenate(packs: Sequence[PackedCells]) -> PackedCells:
    """One pack of all the cells, in order. Packs must agree on having values."""
    if not packs:
        return PackedCells.from_lists([])
    if len(packs) == 1:
        return packs[0]
    with_values = packs[0].values is not None
    if any((pack.values is not None) != with_values for pack in packs):
        raise InvalidArgumentError("some packs have values and some have none", where="concatenate")
    total = sum(pack.num_tokens for pack in packs)
    if total > np.iinfo(np.int32).max:
        raise InvalidArgumentError(f"{total} tokens do not fit one pack of 2^31", where="concatenate")
    lengths = torch.cat([pack.lengths for pack in packs])
    cu_seqlens = torch.zeros(lengths.numel() + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=cu_seqlens[1:])
    return PackedCells(
        token_ids=torch.cat([pack.token_ids for pack in packs]),
        values=torch.cat([pack.values for pack in packs if pack.values is not None]) if with_values else None,
        cu_seqlens=cu_seqlens.to(torch.int32),
        cell_ids=torch.cat([pack.cell_ids for pack in packs]),
    )


def _expect(tensor: Tensor, name: str, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype or tensor.dim() != 1:
        raise InvalidArgumentError(
            f"{name} must be a 1-D {dtype} tensor, found {tuple(tensor.shape)} {tensor.dtype}",
            where="PackedCells",
        )


def _flatten(lists: Sequence[Sequence[float]], dtype: type[np.generic]) -> Tensor:
    flat = np.concatenate([np.asarray(cell) for cell in lists if len(cell)] or [np.empty(0, dtype=dtype)])
    if dtype is np.int32 and flat.size:
        limits = np.iinfo(np.int32)
        if flat.dtype.kind not in "iu" or flat.min() < limits.min or flat.max() > limits.max:
            raise InvalidArgumentError(
                f"token ids must be whole numbers of 32 bits, found {flat.dtype} from {flat.min()} to {flat.max()}",
                where="PackedCells.from_lists",
            )
    return torch.from_numpy(flat.astype(dtype))
