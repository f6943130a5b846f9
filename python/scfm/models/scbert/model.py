"""scBERT on packed cells: bins of expressed genes in, hidden states of the whole panel, bins, classes, embeddings out.

    h = E[bin] + gene2vec[position];   L Performer blocks;   hidden = LN(h);   bins = W hidden,  classes = head(hidden)

Every cell has all positions of the panel and one slot behind them; genes that were not given have bin 0. A cell's
result never depends on its batch: attention's key maximum is the cell's own, unless kmax_scope="batch" asks for the
released code's reading of a batch. Without gradients cells go through one after the other, which is as fast at this
length and bounds the memory. Source: Yang et al. 2022 and the released scBERT code (PerformerLM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from scfm.data.packed import PackedCells
from scfm.data.source import CellSource
from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.nn.derived import Derived
from scfm.models.nn.linear import Linear
from scfm.models.nn.performer import KmaxScope, Performer
from scfm.models.pooling import mean_of_genes
from scfm.models.scbert.annotation_head import AnnotationHead
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.inputs import Inputs, checked_inputs
from scfm.models.scbert.output import ScbertOutput
from scfm.models.scbert.zero_genes import ZeroGenes
from scfm.ops.products import row_stable_linear
from scfm.tokenize.scbert import ScbertTokenizer
from scfm.tokenize.scbert_panel import ScbertPanel

POOLINGS = ("gene_mean", "mean", "last")

# Rows computed at once where no gradient is kept: one cell of the released panel, many of a small one.
_ROWS_AT_ONCE = 16_384
# Below this many positions layer 0 is done before its constants could help.
_LONG_PANEL = 4_096


class Scbert(FoundationModel):
    """A scBERT with the heads that its config names; the others are None.

    config: shapes and parts; vocab: the panel, or None (then it runs on positions only).
    """

    family = "scbert"
    config: ScbertConfig
    vocab: ScbertPanel | None

    def __init__(self, config: ScbertConfig, vocab: ScbertPanel | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self._tokenizer: ScbertTokenizer | None = None
        if vocab is not None and len(vocab) != config.num_genes:
            raise InvalidArgumentError(
                f"{len(vocab):,} genes; the model's panel has {config.num_genes:,}",
                path=vocab.source or None,
                where="genes",
                hint="Give the gene order that these weights were trained with.",
            )
        size = config.hidden_size
        self.token_emb = nn.Embedding(config.num_token_ids, size)
        # Never trained, and float64 in the authors' files: states are added in it and then rounded, as there.
        self.pos_emb = (
            nn.Parameter(torch.empty(config.num_positions, size), requires_grad=False)
            if config.gene2vec
            else None
        )
        self.performer = Performer(config.performer)
        self.norm = nn.LayerNorm(size, eps=1e-5)
        self.to_out = (
            Linear(size, config.num_token_ids) if config.has_bin_head and not config.tied_head else None
        )
        self.annotation_head = AnnotationHead(config) if config.num_classes else None
        self._zero_states = Derived()
        self._zero_genes = ZeroGenes()

    @classmethod
    def from_config(cls, config: ScbertConfig, vocab: ScbertPanel | None = None, *, seed: int = 0) -> Scbert:
        """Fresh weights from the original's distributions; gene2vec is Gaussian, the slot's row 0."""
        model = cls(config, vocab)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            model.token_emb.weight.normal_(generator=generator)
            if model.pos_emb is not None:
                model.pos_emb.normal_(generator=generator)
                model.pos_emb[-1] = 0
            model.performer.initialise(generator, seed=seed)
            if model.to_out is not None:
                bound = config.hidden_size**-0.5
                model.to_out.weight.uniform_(-bound, bound, generator=generator)
                model.to_out.bias.uniform_(-bound, bound, generator=generator)
            if model.annotation_head is not None:
                model.annotation_head.initialise(generator)
        return model.eval()

    @property
    def tokenizer(self) -> ScbertTokenizer:
        """Tokenizer of this model's panel; raises InvalidArgumentError when it has none."""
        if self._tokenizer is None:
            if self.vocab is None:
                raise InvalidArgumentError(
                    "the model was loaded without its gene order, so it cannot map genes to positions",
                    hint="Give genes= to scfm.load, or tokens as scfm.PackedCells.",
                )
            self._tokenizer = ScbertTokenizer(self.vocab)
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: ScbertTokenizer) -> None:
        """Another one with the same panel: a least number of genes, values that are logarithms, ..."""
        if len(tokenizer.vocab) != self.config.num_genes:
            raise InvalidArgumentError(
                f"its panel has {len(tokenizer.vocab):,} genes, the model's {self.config.num_genes:,}",
                where="tokenizer",
            )
        self._tokenizer = tokenizer

    @property
    def default_layer(self) -> int:
        """0, the last layer."""
        return 0

    @property
    def default_pooling(self) -> str:
        """The authors define none; "gene_mean" is what users settled on."""
        return "gene_mean"

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(
        self, packed: PackedCells, output_hidden_states: bool = False, *, kmax_scope: KmaxScope = "cell"
    ) -> ScbertOutput:
        """Hidden states of every position of every cell, and by reading them the heads.

        packed: positions on the panel (its length is the slot) and bins; the last id hides a bin. Output rows are cell
        by cell, num_genes + 1 each. kmax_scope: "batch" for the released code's dependence on the batch.
        hidden_states: those before and after each block, without the final norm. Raises InvalidArgumentError.
        """
        inputs = checked_inputs(self.config, packed, self.device)
        states = None
        if output_hidden_states:
            states = self.performer.run(
                self.embed_bins(inputs.bins), inputs.cu_seqlens, kmax_scope, keep_states=True
            )
            hidden = self.norm(states[-1])
        else:
            hidden = self.norm(self._last_states(inputs, self.config.num_layers, kmax_scope))
        has_bins = self.to_out is not None or self.config.tied_head
        return ScbertOutput(
            hidden,
            num_positions=self.config.num_positions,
            hidden_states=None if states is None else tuple(states),
            head=self.bin_scores if has_bins else None,
            annotation_head=self.annotation_head,
        )

    def embed_bins(self, bins: Tensor) -> Tensor:
        """bins: int64 (C, P) -> (C * P, hidden_size), the states before the first block."""
        embedded: Tensor = self.token_emb(bins)
        return self._placed(embedded, self.pos_emb).flatten(0, 1)

    def _placed(self, embedded: Tensor, positions: Tensor | None) -> Tensor:
        if positions is None:
            return embedded
        wide = torch.promote_types(positions.dtype, embedded.dtype)
        return (embedded.to(wide) + positions).to(embedded.dtype)

    def _last_states(self, inputs: Inputs, num_layers: int, kmax_scope: KmaxScope) -> Tensor:
        """States after the first ``num_layers`` blocks, (C * P, hidden_size)."""
        if torch.is_grad_enabled() or kmax_scope == "batch" or self.training:
            states = self.embed_bins(inputs.bins)
            return self.performer.run(states, inputs.cu_seqlens, kmax_scope, num_layers=num_layers)[-1]
        positions = self.config.num_positions
        at_once = max(_ROWS_AT_ONCE // positions, 1)
        parts = [
            self._states_of_few(inputs.cells(slice(start, start + at_once)), num_layers)
            for start in range(0, inputs.num_cells, at_once)
        ]
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else self.token_emb.weight.new_empty(0, self.config.hidden_size)

    def _states_of_few(self, inputs: Inputs, num_layers: int) -> Tensor:
        if inputs.num_cells == 1 and num_layers and self._skips_zero_genes():
            first = self._first_block(inputs.bins[0])
            if first is not None:
                return self.performer.run(first, inputs.cu_seqlens, first=1, num_layers=num_layers)[-1]
        states = self.embed_bins(inputs.bins)
        return self.performer.run(states, inputs.cu_seqlens, num_layers=num_layers)[-1]

    def _skips_zero_genes(self) -> bool:
        """Where that pays: in bfloat16 the native kernel does the whole layer in less time than the sums take."""
        shape = self.performer.shape
        if self.device.type != "cpu" or self.compute_dtype == torch.bfloat16:
            return False
        return (
            self.config.num_positions >= _LONG_PANEL and shape.attention == "favor" and not shape.reversible
        )

    def _first_block(self, bins: Tensor) -> Tensor | None:
        """The states after block 0 from the genes that are not 0; None where that is not worth it."""
        weights = [self.token_emb.weight] + ([] if self.pos_emb is None else [self.pos_emb])
        zeros = self._zero_states.of(weights, lambda: self.embed_bins(torch.zeros_like(bins)[None]))
        expressed = bins.nonzero().flatten()
        positions = None if self.pos_emb is None else self.pos_emb[expressed]
        states = self._placed(self.token_emb.weight[bins[expressed]], positions)
        block = self.performer.blocks()[0]
        found = self._zero_genes.attend(block, zeros, expressed, states)
        return None if found is None else block.after_attention(*found)

    def bin_scores(self, hidden: Tensor) -> Tensor:
        """Scores of every id, float32 (T, num_token_ids), of final hidden states (T, hidden_size)."""
        if self.to_out is None:
            return row_stable_linear(hidden, self.token_emb.weight)
        return row_stable_linear(hidden, self.to_out.weight, self.to_out.bias)

    # ---- annotation ---------------------------------------------------------------------------------------------

    @property
    def class_names(self) -> list[str]:
        """Names of the annotation head's classes; "0", "1", ... where they are not known. Setting them checks them."""
        return list(self.config.class_names) or [str(number) for number in range(self.config.num_classes)]

    @class_names.setter
    def class_names(self, names: Sequence[str]) -> None:
        if len(names) != self.config.num_classes:
            raise InvalidArgumentError(
                f"{len(names):,} names; the annotation head has {self.config.num_classes:,} classes",
                where="class_names",
                hint="Give the sorted cell types that this head was trained on.",
            )
        self.config = replace(self.config, class_names=tuple(names))

    def add_annotation_head(self, class_names: Sequence[str], *, seed: int = 0) -> None:
        """A new head for these cell types, in the authors' shape; it takes the place of the head for bins."""
        names = tuple(str(name) for name in class_names)
        self.config = replace(
            self.config, num_classes=len(names), class_names=names, has_bin_head=False, tied_head=False
        )
        head = AnnotationHead(self.config)
        head.initialise(torch.Generator().manual_seed(seed))
        self.annotation_head = head.to(self.device)
        self.to_out = None

    # ---- embeddings ---------------------------------------------------------------------------------------------

    def read_cells(
        self, data: Any, *, counts_layer: str | None = None, assume_counts: bool = False
    ) -> CellSource:
        return self.tokenizer.read(data, layer=counts_layer, assume_counts=assume_counts)

    def embed_batch(self, packed: PackedCells, *, layer: int, pooling: str) -> Tensor:
        """Cell embeddings, float32 (C, hidden_size): "gene_mean", "mean" (with the slot) or "last" (the slot alone)."""
        self.check_embedding(layer, pooling)
        inputs = checked_inputs(self.config, packed, self.device)
        positions = self.config.num_positions
        at_once = max(_ROWS_AT_ONCE // positions, 1)
        cells = []
        for start in range(0, inputs.num_cells, at_once):
            few = inputs.cells(slice(start, start + at_once))
            hidden = self._states_at(few, layer)
            if pooling == "last":
                cells.append(hidden[positions - 1 :: positions].float())
            else:
                cells.append(mean_of_genes(hidden, few.cu_seqlens, trailing=int(pooling == "gene_mean")))
        return torch.cat(cells)

    def check_embedding(self, layer: int, pooling: str) -> None:
        self._num_layers_for(layer)
        if pooling not in POOLINGS:
            raise InvalidArgumentError(f"{pooling!r}; scBERT has {', '.join(POOLINGS)}", where="pooling")

    def hidden_at(self, packed: PackedCells, layer: int) -> Tensor:
        """Hidden states at the pack's tokens, (T, hidden_size): layer 0 is the last, -1 the one before, and so on."""
        inputs = checked_inputs(self.config, packed, self.device)
        return self._states_at(inputs, layer)[inputs.rows].float()

    def _states_at(self, inputs: Inputs, layer: int) -> Tensor:
        states = self._last_states(inputs, self._num_layers_for(layer), "cell")
        return self.norm(states) if layer == 0 else states

    def gene_table_embeddings(self) -> tuple[list[str], np.ndarray]:
        """gene2vec as the model has it, without the slot: names and float32 (genes, hidden_size)."""
        if self.pos_emb is None:
            raise InvalidArgumentError(
                "this model was made without gene2vec",
                where="gene_embeddings",
                hint="Give data= for cells' states.",
            )
        table = self.pos_emb.detach()[:-1].float().cpu().numpy().copy()
        names = self.token_names()
        return [names[position] for position in range(self.config.num_genes)], table

    def token_names(self) -> dict[int, str]:
        """Gene symbol of every position; the slot is "<slot>"."""
        size = self.config.num_genes
        genes = [str(position) for position in range(size)] if self.vocab is None else self.vocab.genes
        return {**dict(enumerate(genes)), size: "<slot>"}

    def save(self, folder: str | Path) -> Path:
        from scfm.models.scbert.checkpoint import save_scbert

        return save_scbert(self, Path(folder))

    def _num_layers_for(self, layer: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise InvalidArgumentError(
                f"{layer!r}; expected a whole number, 0 for the last layer",
                where="layer",
                hint="The layer of the data that holds the counts is counts_layer=.",
            )
        if not -self.config.num_layers <= layer <= 0:
            raise InvalidArgumentError(
                f"{layer}; expected {-self.config.num_layers} (embedding) to 0 (last layer)", where="layer"
            )
        return self.config.num_layers + layer
