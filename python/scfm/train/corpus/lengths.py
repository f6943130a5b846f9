"""The lengths of a corpus's cells, found by tokenizing each once, and a fingerprint of what was tokenized.

How many positions a cell takes depends on which of its genes are known, on its zeros, on how it is cut: rather than
know all that a second time, the pass asks the tokenizer and the objective themselves. What it sees on the way is
checksummed, so that a resumed run can tell the same cells from others, wherever their files lie now.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList

__all__ = ["LengthsOf", "differences", "fingerprint_of", "measure_cells"]

LengthsOf = Callable[[PackedCells], Tensor]


def measure_cells(
    tokenizer: Any, cells: SourceList, lengths_of: LengthsOf, sign: Callable[[], None]
) -> tuple[NDArray[np.unsignedinteger], list[int]]:
    """uint32 (cells,): the length of every cell, 0 without tokens; and a checksum of each part's tokens.

    sign: called after each block.
    """
    lengths = np.zeros(len(cells), dtype=np.uint32)
    ends = np.cumsum([len(part) for part in cells.parts])
    checksums = [_TokensChecksum() for _ in ends]
    for packed in tokenizer.packs(cells):
        if packed.num_cells:
            ids = packed.cell_ids.numpy()
            lengths[ids] = lengths_of(packed).numpy()
            # A block is of one part.
            checksums[int(np.searchsorted(ends, ids[0], side="right"))].add(packed)
        sign()
    return lengths, [checksum.crc32 for checksum in checksums]


def fingerprint_of(
    parts: Sequence[CellSource],
    lengths: NDArray[np.unsignedinteger],
    checksums: Sequence[int],
    vocabulary_sha256: str,
) -> dict[str, Any]:
    """Small enough for a checkpoint: each file with its shape and checksum, and what holds for all."""
    files = [
        {
            "name": part.name,
            "cells": len(part),
            "genes": part.num_genes,
            "counts_from": part.counts_from,
            "tokens_crc32": checksum,
        }
        for part, checksum in zip(parts, checksums, strict=True)
    ]
    return {
        "files": files,
        "vocabulary_sha256": vocabulary_sha256,
        "num_training": int(np.count_nonzero(lengths)),
        "lengths_crc32": zlib.crc32(lengths.tobytes()),
    }


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """How one fingerprint differs from another, a sentence each, naming the file; none if all is the same."""
    old_files, new_files = before.get("files", []), now["files"]
    if len(old_files) != len(new_files):
        return [f"{len(new_files)} data files instead of {len(old_files)}"]
    told = []
    for old, new in zip(old_files, new_files, strict=True):
        if old.get("cells") != new["cells"]:
            told.append(f"{new['name']} has {new['cells']:,} cells instead of {old.get('cells'):,}")
        elif old.get("tokens_crc32") != new["tokens_crc32"]:
            told.append(f"{new['name']} has other cells or counts than {old.get('name')} had")
    if before.get("vocabulary_sha256") != now["vocabulary_sha256"]:
        told.append("the vocabulary is another")
    if not told and before.get("lengths_crc32") != now["lengths_crc32"]:
        told.append("other cells are held out, or cells have other lengths")
    return told


class _TokensChecksum:
    """Of cells that come in packs of any size."""

    def __init__(self) -> None:
        self._crcs = [0, 0, 0]

    def add(self, packed: PackedCells) -> None:
        for i, tensor in enumerate((packed.token_ids, packed.values, packed.lengths)):
            if tensor is not None:
                self._crcs[i] = zlib.crc32(tensor.contiguous().numpy().data, self._crcs[i])

    @property
    def crc32(self) -> int:
        return zlib.crc32(repr(self._crcs).encode())
