"""scGPT's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from scfm.data.packed import PackedCells
from scfm.data.source import CellSource
from scfm.tokenize.report import TokenizeReport
from scfm.tokenize.scgpt_vocab import ScgptVocab

Binning = Literal["seeded", "upstream", "pretrain"]
LongCells = Literal["seeded", "top", "upstream"]
InputStyle = Literal["binned", "log1p", "normed_raw"]


class ScgptTokenizer:
    """Signatures are final."""

    vocab: ScgptVocab
    max_tokens: int
    num_bins: int
    species: str
    report: TokenizeReport | None

    def __init__(
        self,
        vocab: ScgptVocab,
        *,
        max_tokens: int = 1200,
        num_bins: int = 51,
        binning: Binning = "seeded",
        long_cells: LongCells = "seeded",
        input_style: InputStyle = "binned",
        cls_value: float = -2.0,
        append_cls: bool = True,
        include_zero_genes: bool = False,
        duplicate_genes: Literal["repeat", "sum"] = "repeat",
        gene_column: str | None = None,
        species: str = "human",
        seed: int = 0,
    ) -> None: ...

    @classmethod
    def from_vocab(cls, path: str | Path, **options: Any) -> ScgptTokenizer: ...

    def read(self, data: Any, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
        """X as it is."""

    def __call__(
        self,
        data: Any,
        *,
        layer: str | None = None,
        assume_counts: bool = False,
        species: str | None = None,
    ) -> PackedCells: ...

    def packs(
        self,
        source: CellSource,
        *,
        species: str | None = None,
        use_filter_pass: bool = True,
        empty_bad_cells: bool = False,
        block_size: int | None = None,
    ) -> Iterator[PackedCells]: ...

    def shuffled_packs(
        self,
        source: CellSource,
        *,
        seed: int,
        epoch: int = 0,
        block_size: int = 64,
        window: int = 4096,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        species: str | None = None,
        use_filter_pass: bool = True,
        empty_bad_cells: bool = False,
    ) -> Iterator[tuple[int, PackedCells]]: ...

    def check_genes(self, source: CellSource, *, species: str | None = None) -> None: ...

    def describe(self) -> dict[str, Any]: ...
