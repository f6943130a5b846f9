"""scFoundation on packed cells: expressed genes with values in, states, cell embeddings and expression out.

    x = e(value) + position;   L post-norm layers over what is expressed;   norm;   then the decoder over all genes

Reproduces the released MaeAutobin. The encoder never sees a gene without expression, nor padding; the decoder runs only
when the prediction or gene embeddings are asked for (see decoder.py). Attention has no dropout of its own in training,
as in the other families. Source: Hao et al. 2024 and the released code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scfm.data.available_memory import require_memory
from scfm.data.packed import PackedCells
from scfm.data.source import CellSource
from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.engine import default_token_budget
from scfm.models.nn.derived import Derived
from scfm.models.nn.encoder import EncoderLayer
from scfm.models.nn.linear import Linear
from scfm.models.nn.performer import KmaxScope
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scfoundation.decoder import Decoder
from scfm.models.scfoundation.inputs import Inputs, checked_inputs, merged
from scfm.models.scfoundation.output import ScfoundationOutput
from scfm.models.scfoundation.pooling import WIDTHS, pool_cells
from scfm.models.scfoundation.value_embedding import Table, ValueEmbedding
from scfm.tokenize.scfoundation import ScfoundationTokenizer
from scfm.tokenize.scfoundation_genes import SOURCE_DEPTH, TARGET_DEPTH, ScfoundationGenes


class Scfoundation(FoundationModel):
    """One variant of scFoundation. config: shapes; vocab: the genes in order."""

    family = "scfoundation"
    config: ScfoundationConfig
    vocab: ScfoundationGenes

    def __init__(self, config: ScfoundationConfig, vocab: ScfoundationGenes) -> None:
        super().__init__()
        if vocab.num_genes != config.num_genes:
            raise InvalidArgumentError(
                f"{vocab.num_genes:,} genes; the model has positions for {config.num_genes:,}",
                path=vocab.source or None,
                where="genes",
                hint="Give the list of genes that came with these weights.",
            )
        self.config = config
        self.vocab = vocab
        self._tokenizer = ScfoundationTokenizer(vocab)
        size = config.hidden_size
        self.token_emb = ValueEmbedding(
            size,
            config.num_bins,
            alpha=config.bin_alpha,
            mask_value=config.mask_value,
            pad_value=config.pad_value,
        )
        self.pos_emb = Table(config.vocab_size + 1, size)  # the last row is padding's
        self.layers = nn.ModuleList(
            EncoderLayer(
                size,
                config.num_heads,
                config.ffn_size,
                activation="relu",
                norm_eps=1e-5,
                dropout=config.dropout,
                inner_dropout=True,
            )
            for _ in range(config.num_layers)
        )
        self.encoder_norm = nn.LayerNorm(size, eps=1e-5)
        self.decoder = Decoder(config)
        self._empty: tuple[torch.dtype, Derived] | None = None

    @classmethod
    def from_config(
        cls, config: ScfoundationConfig, vocab: ScfoundationGenes, *, seed: int = 0
    ) -> Scfoundation:
        """A model with fresh weights, drawn from the distributions of the original's modules."""
        from scfm.models.scfoundation.initialise import initialise

        model = cls(config, vocab)
        initialise(model, seed=seed)
        return model.eval()

    @property
    def tokenizer(self) -> ScfoundationTokenizer:
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: ScfoundationTokenizer) -> None:
        """Another one of the same genes: another target depth, pre-normalised or bulk input."""
        if tokenizer.vocab.token != self.vocab.token:
            raise InvalidArgumentError("it has other genes than the model", where="tokenizer")
        self._tokenizer = tokenizer

    def with_input(self, **options: Any) -> Scfoundation:
        """This model with its tokenizer's options changed: target, pre_normalized, input_type, ...

        The weights are shared, nothing is copied: ``scfm.tl.embed(adata, model.with_input(target="a5"))``.
        """
        view = copy.copy(self)
        view._tokenizer = self._tokenizer.with_options(**options)
        return view

    @property
    def default_layer(self) -> int:
        """The authors': 0, the last layer."""
        return 0

    @property
    def default_pooling(self) -> str:
        """The authors': "all"."""
        return "all"

    def embedding_size(self, pooling: str) -> int:
        """Numbers in a cell embedding of this pooling: 4 hidden_size for "all"."""
        return WIDTHS[pooling] * self.config.hidden_size

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        packed: PackedCells,
        output_hidden_states: bool = False,
        *,
        late: PackedCells | None = None,
        kmax_scope: KmaxScope = "cell",
    ) -> ScfoundationOutput:
        """States of every token, and by reading it the prediction of every gene.

        packed: positions, ascending in each cell, with values. late: as many cells of tokens that only the decoder
        sees, such as masked genes with ``config.mask_value``; positions in neither have no expression. kmax_scope:
        "batch" makes predictions depend on the batch as the authors' do, and holds all its cells in memory.
        Raises InvalidArgumentError naming the cell.
        """
        inputs = checked_inputs(self.config, packed, self.device)
        late_inputs = None if late is None else checked_inputs(self.config, late, self.device, beside=inputs)
        states = self._run(inputs, keep_states=output_hidden_states)

        def predict(hidden: Tensor) -> Tensor:
            cells = self._decoded(inputs, hidden, late_inputs, kmax_scope)
            return torch.cat([self.decoder.expression(states) for states in cells])

        return ScfoundationOutput(
            self.encoder_norm(states[-1]),
            predict=predict,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def _run(
        self, inputs: Inputs, *, num_layers: int | None = None, keep_states: bool = False
    ) -> list[Tensor]:
        """States after the first ``num_layers`` layers (default all): the last, or all from the embedding on."""
        states = [self._embed_tokens(inputs)]
        for layer in self.layers[:num_layers]:
            hidden = layer(states[-1], inputs.cu_seqlens)
            states = [*states, hidden] if keep_states else [hidden]
        return states

    def _embed_tokens(self, inputs: Inputs) -> Tensor:
        embedded: Tensor = self.token_emb(inputs.values) + self.pos_emb.weight.index_select(
            0, inputs.token_ids
        )
        return embedded

    def _decoded(
        self, inputs: Inputs, hidden: Tensor, late: Inputs | None, kmax_scope: KmaxScope
    ) -> Iterator[Tensor]:
        """The decoder's states of all positions, some cells at a time."""
        token_ids, rows, cu_seqlens = inputs.token_ids, hidden, inputs.cu_seqlens
        if late is not None:
            token_ids, rows, cu_seqlens = merged(inputs, hidden, late, self.token_emb(late.values))
        entered = self.decoder.enter(rows + self.pos_emb.weight.index_select(0, token_ids))
        return self.decoder.states(self._empty_rows(), token_ids, entered, cu_seqlens, kmax_scope)

    def _empty_rows(self) -> Tensor:
        """How each position enters the decoder without expression, (vocab_size, decoder_size); once a model."""

        def compute() -> Tensor:
            return self.decoder.enter(
                self.token_emb.of_zero() + self.pos_emb.weight[: self.config.vocab_size]
            )

        embed = self.decoder.embed
        weights = [*self.token_emb.parameters(), self.pos_emb.weight, embed.weight, embed.bias]
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in weights):
            return compute()
        if self._empty is None or self._empty[0] != embed.compute_dtype:
            self._empty = (embed.compute_dtype, Derived())
        return self._empty[1].of(weights, compute)

    def read_cells(
        self, data: Any, *, counts_layer: str | None = None, assume_counts: bool = False
    ) -> CellSource:
        """Raw counts, or X as it is for the tokenizer's pre-normalised and bulk input."""
        return self.tokenizer.read(data, layer=counts_layer, assume_counts=assume_counts)

    # ---- embeddings ---------------------------------------------------------------------------------------------

    def embed_batch(self, packed: PackedCells, *, layer: int, pooling: str) -> Tensor:
        """Cell embeddings of one batch, float32 (C, embedding_size); see ``embed``."""
        self.check_embedding(layer, pooling)
        return pool_cells(self.hidden_at(packed, layer), packed.cu_seqlens.to(self.device), pooling)

    def check_embedding(self, layer: int, pooling: str) -> None:
        """Raise InvalidArgumentError for a layer or pooling that there is not."""
        self._num_layers_for(layer)
        if pooling not in WIDTHS:
            raise InvalidArgumentError(f"{pooling!r}; scFoundation has {', '.join(WIDTHS)}", where="pooling")

    def hidden_at(self, packed: PackedCells, layer: int) -> Tensor:
        """Hidden states of one layer, (T, hidden_size): 0 is the last with the final norm, -1 the one before, ..."""
        inputs = checked_inputs(self.config, packed, self.device)
        hidden = self._run(inputs, num_layers=self._num_layers_for(layer))[-1]
        normed: Tensor = self.encoder_norm(hidden) if layer == 0 else hidden
        return normed

    def gene_table_embeddings(self) -> tuple[list[str], np.ndarray]:
        """The trained position table of the genes: names and float32 (genes, hidden_size)."""
        table = self.pos_emb.weight.detach()[: self.config.num_genes]
        return self.vocab.genes, table.float().cpu().numpy().copy()

    @torch.inference_mode()
    def gene_embeddings(  # type: ignore[override]
        self,
        data: Any = None,
        *,
        per_cell: bool = False,
        kmax_scope: KmaxScope = "cell",
        token_budget: int | None = None,
    ) -> tuple[list[str], np.ndarray]:
        """Gene embeddings: names and float32 (genes, size).

        Without data, the trained position table. With data (as for ``embed``), the decoder's state of every gene,
        expressed or not, averaged over the cells; per_cell keeps each cell's, (cells, genes, decoder_size), which
        are 40 MB a cell of the released models. kmax_scope: "cell" is the authors' output "gene"; "batch" is their
        "gene_batch", where all cells of ``data`` are one batch and depend on each other. Cells without tokens are
        left out. Raises ResourceError, InvalidArgumentError.
        """
        if data is None:
            return self.gene_table_embeddings()
        packed = data if isinstance(data, PackedCells) else None
        if packed is None and (per_cell or kmax_scope == "batch"):
            packed = self.tokenizer(self.read_cells(data))
        if packed is not None:
            self._expect_room(packed.num_cells if per_cell or kmax_scope == "batch" else 1)
        stream = self.tokenizer.packs(self.read_cells(data)) if packed is None else iter([packed])
        num_genes, size = self.config.num_genes, self.config.decoder_size
        kept: list[np.ndarray] = []
        sums = torch.zeros(num_genes, size, dtype=torch.float64, device=self.device)
        num_cells = 0
        for states in chain.from_iterable(
            self.gene_states(pack, kmax_scope=kmax_scope, token_budget=token_budget) for pack in stream
        ):
            genes = states[:, :num_genes]
            num_cells += len(genes)
            if per_cell:
                kept.append(genes.float().cpu().numpy().copy())
            else:
                for cell in genes:  # one by one: the sum does not depend on how cells came together
                    sums += cell
        if per_cell:
            shape = (0, num_genes, size)
            return self.vocab.genes, np.concatenate([np.empty(shape, dtype=np.float32), *kept])
        return self.vocab.genes, (sums / max(num_cells, 1)).float().cpu().numpy()

    def gene_states(
        self, packed: PackedCells, *, kmax_scope: KmaxScope = "cell", token_budget: int | None = None
    ) -> Iterator[Tensor]:
        """The decoder's states, (cells, vocab_size, decoder_size), some cells at a time, in the pack's order.

        kmax_scope="batch": of all cells together.
        """
        budget = (
            packed.num_tokens if kmax_scope == "batch" else token_budget or default_token_budget(self.device)
        )
        for batch in _in_order(packed, max(budget, 1)):
            inputs = checked_inputs(self.config, batch, self.device)
            hidden = self.encoder_norm(self._run(inputs)[-1])
            yield from self._decoded(inputs, hidden, None, kmax_scope)

    @torch.inference_mode()
    def predictions(self, packed: PackedCells, *, token_budget: int | None = None) -> Iterator[np.ndarray]:
        """ln(1 + CP10k) of every gene at the target's depth, float32 (cells, num_genes), cell by cell in memory."""
        for states in self.gene_states(packed, token_budget=token_budget):
            yield self.decoder.expression(states)[:, : self.config.num_genes].float().cpu().numpy()

    def token_names(self) -> dict[int, str]:
        """Gene symbol of every position; the depths are <T> and <S>."""
        return dict(enumerate([*self.vocab.token, TARGET_DEPTH, SOURCE_DEPTH]))

    def save(self, folder: str | Path) -> Path:
        from scfm.models.scfoundation.checkpoint import save_scfoundation

        return save_scfoundation(self, Path(folder))

    def set_compute_dtype(self, dtype: str | torch.dtype) -> Scfoundation:
        """As FoundationModel's; torch.float64 too, after ``.double()``: the oracle of every faster way."""
        if dtype == torch.float64:
            for module in self.modules():
                if isinstance(module, Linear):
                    module.compute_dtype = torch.float64
            return self
        return super().set_compute_dtype(dtype)

    def _expect_room(self, num_cells: int) -> None:
        require_memory(
            4 * num_cells * self.config.vocab_size * self.config.decoder_size,
            purpose=f"an embedding of every gene in {num_cells:,} cells",
            name="scfoundation",
            where="gene_embeddings",
            hint="Give fewer cells, or leave per_cell and kmax_scope out for the mean over cells.",
        )

    def _num_layers_for(self, layer: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise InvalidArgumentError(
                f"{layer!r}; expected a whole number, 0 for the last layer",
                where="layer",
                hint="The layer of the data that holds the expression is counts_layer=.",
            )
        if not -self.config.num_layers <= layer <= 0:
            raise InvalidArgumentError(
                f"{layer}; expected {-self.config.num_layers} (embedding) to 0 (last layer)", where="layer"
            )
        return self.config.num_layers + layer


def _in_order(packed: PackedCells, token_budget: int) -> Iterator[PackedCells]:
    """The pack's cells in batches within the budget, in their order."""
    start, tokens = 0, 0
    for cell, length in enumerate(packed.lengths.tolist()):
        if cell > start and tokens + length > token_budget:
            yield packed.select(slice(start, cell))
            start, tokens = cell, 0
        tokens += length
    if start < packed.num_cells:
        yield packed.select(slice(start, packed.num_cells))
