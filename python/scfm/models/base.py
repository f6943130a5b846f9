"""What every model family offers: tokenize, embed, gene embeddings, save; one way for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor, nn

from scfm.data.packed import PackedCells
from scfm.data.read import read
from scfm.data.source import CellSource
from scfm.models.engine import BadCellPolicy, Progress, default_token_budget, embed_cells, packed_batches
from scfm.models.load_report import LoadReport
from scfm.models.nn.linear import Linear
from scfm.models.nn.precision import resolve_dtype


class FoundationModel(nn.Module, ABC):
    """Base of all families. Loaded in evaluation mode; results never depend on batch, order or company."""

    family: str
    config: Any
    vocab: Any
    load_report: LoadReport | None = None
    source: str | None = None  # the folder or hub id it was loaded from

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Callable on whatever scfm.read accepts; gives PackedCells."""

    @property
    @abstractmethod
    def default_layer(self) -> int:
        """The authors' layer for cell embeddings, counted from the last (0) downwards."""

    @property
    @abstractmethod
    def default_pooling(self) -> str:
        """The authors' pooling for cell embeddings."""

    def embedding_size(self, pooling: str) -> int:
        """Numbers in a cell embedding of this pooling, one that ``check_embedding`` accepts."""
        return int(self.config.hidden_size)

    @abstractmethod
    def embed_batch(self, packed: PackedCells, *, layer: int, pooling: str) -> Tensor:
        """One batch's cell embeddings, float32 (C, embedding_size). Raises InvalidArgumentError."""

    @abstractmethod
    def check_embedding(self, layer: int, pooling: str) -> None:
        """Raise InvalidArgumentError for a layer or pooling that the model does not have."""

    @abstractmethod
    def hidden_at(self, packed: PackedCells, layer: int) -> Tensor:
        """One layer's hidden states of a batch, float32 (T, hidden_size)."""

    @abstractmethod
    def gene_table_embeddings(self) -> tuple[list[str], np.ndarray]:
        """The trained gene table: names and float32 (genes, hidden_size)."""

    @abstractmethod
    def token_names(self) -> dict[int, str]:
        """Token id to gene (or special token)."""

    @abstractmethod
    def save(self, folder: str | Path) -> Path:
        """Write scfm's folder, whole or not at all; raises InvalidArgumentError if it holds something."""

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of matrix products: float32 or bfloat16."""
        return next(m.compute_dtype for m in self.modules() if isinstance(m, Linear))

    def set_compute_dtype(self, dtype: str | torch.dtype) -> Self:
        """Choose "float32", "bfloat16" or "auto" (bfloat16 where the hardware multiplies it natively)."""
        resolved = resolve_dtype(dtype, self.device)
        for module in self.modules():
            if isinstance(module, Linear):
                module.compute_dtype = resolved
        return self

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def read_cells(
        self, data: Any, *, counts_layer: str | None = None, assume_counts: bool = False
    ) -> CellSource:
        """What the family embeds of ``data`` (whatever scfm.read accepts): raw counts, unless it says otherwise."""
        return read(data, layer=counts_layer, assume_counts=assume_counts)

    def tokenize(
        self,
        data: Any,
        *,
        counts_layer: str | None = None,
        assume_counts: bool = False,
        species: str | None = None,
    ) -> PackedCells:
        """Tokens of every cell of ``data`` (whatever scfm.read accepts); cells without tokens are left out."""
        packed: PackedCells = self.tokenizer(
            data, layer=counts_layer, assume_counts=assume_counts, species=species
        )
        return packed

    def embed(
        self,
        data: Any,
        *,
        layer: int | None = None,
        pooling: str | None = None,
        token_budget: int | None = None,
        on_bad_cell: BadCellPolicy = "error",
        progress: Progress | None = None,
        counts_layer: str | None = None,
        assume_counts: bool = False,
        species: str | None = None,
    ) -> np.ndarray:
        """Cell embeddings, float32 (cells, ``embedding_size(pooling)``), rows in the input's order.

        data: AnnData, a path, a CellSource or PackedCells. layer: 0 is the last, -1 the second to last (the
        authors' counting); pooling: "cls" or "mean" over gene tokens; defaults are the authors'.
        token_budget: most tokens computed at once; it bounds memory and never changes the result.
        on_bad_cell: a cell without any known gene raises BadCellError ("error"), gives a row of NaN ("nan")
        or is left out ("skip"). progress: called with (cells done, cells in all, tokens done).
        counts_layer, assume_counts: as ``layer`` and ``assume_counts`` of scfm.read; species: "human" or
        "mouse" (one-to-one orthologues).
        """
        if not isinstance(data, PackedCells):
            _ = self.tokenizer  # without dictionaries that is the first thing to say
        return embed_cells(
            self,
            data,
            layer=self.default_layer if layer is None else layer,
            pooling=self.default_pooling if pooling is None else pooling,
            token_budget=token_budget,
            on_bad_cell=on_bad_cell,
            progress=progress,
            counts_layer=counts_layer,
            assume_counts=assume_counts,
            species=species,
        )

    @torch.inference_mode()
    def gene_embeddings(
        self,
        data: Any = None,
        *,
        layer: int | None = None,
        token_budget: int | None = None,
        specials: bool = False,
    ) -> tuple[list[str], np.ndarray]:
        """Gene embeddings: names and float32 (genes, hidden_size).

        Without data, the trained gene table. With data (as for ``embed``), each gene's hidden state averaged
        over the cells that express it, as the authors' extractor does; ``specials`` keeps <cls> and <eos>.
        """
        if data is None:
            return self.gene_table_embeddings()
        stream = (
            iter([data]) if isinstance(data, PackedCells) else self.tokenizer.packs(self.read_cells(data))
        )
        layer = self.default_layer if layer is None else layer
        names = self.token_names()
        size = self.config.vocab_size
        sums: Tensor | None = None
        counts = torch.zeros(size, dtype=torch.int64, device=self.device)
        budget = token_budget or default_token_budget(self.device)
        for batch in chain.from_iterable(packed_batches(pack, budget) for pack in stream):
            hidden = self.hidden_at(batch, layer).double()
            tokens = batch.token_ids.to(self.device, torch.int64)
            if sums is None:
                sums = torch.zeros(size, hidden.shape[1], dtype=torch.float64, device=self.device)
            sums.index_add_(0, tokens, hidden)
            counts += torch.bincount(tokens, minlength=size)
        if sums is None:
            return [], np.empty((0, self.config.hidden_size), dtype=np.float32)
        seen = [
            token
            for token in counts.nonzero().flatten().tolist()
            if specials or not names.get(token, "").startswith("<")
        ]
        means = (sums[seen] / counts[seen].unsqueeze(1)).float()
        return [names.get(token, str(token)) for token in seen], means.cpu().numpy()
