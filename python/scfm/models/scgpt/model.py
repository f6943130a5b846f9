"""scGPT on packed cells: genes with values in, hidden states, expression, cell embeddings and predictions out.

Reproduces the released TransformerModel, and by their weights the multi-omic model, the perturbation generator and
scGPT-spatial's mixture model, without padding (network.py has the parts). For embeddings the last layer computes
<cls> alone. Source: Cui et al. 2024 and the released code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scfm.data.packed import PackedCells
from scfm.data.source import CellSource
from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.decoders import Expression
from scfm.models.scgpt.initialise import initialise
from scfm.models.scgpt.inputs import Inputs, checked_inputs
from scfm.models.scgpt.layers import ScgptLayer
from scfm.models.scgpt.network import ScgptNetwork
from scfm.models.scgpt.output import ScgptOutput
from scfm.models.scgpt.padding import PaddedReading, Padding, check_reading, padded, padding_counts
from scfm.models.scgpt.pooling import POOLINGS, pool_cells, unit_rows
from scfm.models.scgpt.row_labels import labels_of, row_labels, row_labels_known
from scfm.tokenize.scgpt import ScgptTokenizer
from scfm.tokenize.scgpt_vocab import ScgptVocab


class Scgpt(ScgptNetwork, FoundationModel):
    """A scGPT encoder with the heads that its config names; the others are None.

    config: shapes and parts; vocab: vocab.json, or None (then it runs on token ids only).
    """

    family = "scgpt"
    config: ScgptConfig
    vocab: ScgptVocab | None

    def __init__(self, config: ScgptConfig, vocab: ScgptVocab | None = None) -> None:
        if vocab is not None and vocab.size != config.vocab_size:
            raise InvalidArgumentError(
                f"{vocab.size:,} tokens; the model's gene table has {config.vocab_size:,} rows",
                path=vocab.source or None,
                hint="Give the vocab.json that came with these weights.",
            )
        super().__init__(config, None if vocab is None else vocab.token.get(config.pad_token))
        self.vocab = vocab
        self._tokenizer: ScgptTokenizer | None = None

    @classmethod
    def from_config(cls, config: ScgptConfig, vocab: ScgptVocab | None = None, *, seed: int = 0) -> Scgpt:
        """A model with fresh weights, drawn from the original's distributions."""
        model = cls(config, vocab)
        initialise(model, seed=seed)
        return model.eval()

    @property
    def tokenizer(self) -> ScgptTokenizer:
        """Tokenizer of this model's vocabulary; raises InvalidArgumentError when it has none."""
        if self._tokenizer is None:
            if self.vocab is None:
                raise InvalidArgumentError(
                    "the model was loaded without vocab.json, so it cannot map genes to tokens",
                    hint="Put vocab.json beside the weights, or give tokens as scfm.PackedCells.",
                )
            self._tokenizer = ScgptTokenizer(
                self.vocab,
                max_tokens=self.config.max_tokens,
                num_bins=self.config.num_bins,
                input_style=self.config.input_style,
                cls_value=self.config.pad_value,
            )
        return self._tokenizer

    @tokenizer.setter
    def tokenizer(self, tokenizer: ScgptTokenizer) -> None:
        """Another one with the same vocabulary: other genes kept of long cells, the authors' own draws, ..."""
        if tokenizer.vocab.size != self.config.vocab_size:
            raise InvalidArgumentError(
                f"its vocabulary has {tokenizer.vocab.size:,} tokens, the model {self.config.vocab_size:,}",
                where="tokenizer",
            )
        self._tokenizer = tokenizer

    @property
    def default_layer(self) -> int:
        """The authors' default: 0, the last layer."""
        return 0

    @property
    def default_pooling(self) -> str:
        """Where the model's own cell embedding is read; in the released models "cls"."""
        return self.config.cell_style

    # ---- forward ------------------------------------------------------------------------------------------------

    def forward(
        self,
        packed: PackedCells,
        output_hidden_states: bool = False,
        *,
        batch_labels: Any = None,
        modalities: Any = None,
        pert_flags: Any = None,
        num_known: Any = None,
        first_states: Tensor | None = None,
        padding: PaddedReading | None = None,
        padded_length: int | None = None,
    ) -> ScgptOutput:
        """Hidden states of every token, and by reading them the heads.

        packed: token ids below ``config.vocab_size``, each cell beginning with <cls>, and values.
        batch_labels: whole numbers (C,); modalities, pert_flags: (T,), where the model has such inputs.
        num_known: (C,), generation: tokens behind the first ``num_known`` are to be generated, their values unread.
        first_states: float32 (C, hidden_size), enters in place of each cell's first token, as the second pass of
        generative training has it. padding: read as the original's padded batch (see padding.py), of
        ``padded_length`` tokens, by default the longest cell's. Raises InvalidArgumentError naming the cell.
        """
        inputs = checked_inputs(
            self.config,
            packed,
            self.device,
            batch_labels=batch_labels,
            modalities=modalities,
            pert_flags=pert_flags,
            num_known=num_known,
        )
        if padding is not None:
            return self._forward_padded(
                packed, inputs, padding, padded_length, keep_states=output_hidden_states
            )
        states = self.run(inputs, self.embed_tokens(inputs, first_states), keep_states=output_hidden_states)
        return ScgptOutput(
            states[-1],
            model=self,
            inputs=inputs,
            cells=packed,
            hidden_states=tuple(states) if output_hidden_states else None,
        )

    def generate(
        self,
        packed: PackedCells,
        cell_embeddings: Tensor,
        *,
        batch_labels: Any = None,
        use_values: bool = True,
    ) -> Expression:
        """Expression of the pack's genes for given cell embeddings, which enter in place of each <cls>.

        use_values: the other tokens bring their values along; without, their genes only.
        Source: TransformerModel.generate.
        """
        inputs = checked_inputs(
            self.config, packed, self.device, batch_labels=batch_labels, needs_values=use_values
        )
        return self.decode(self.run(inputs, self.embed_tokens(inputs, cell_embeddings))[-1], inputs)

    def _forward_padded(
        self,
        packed: PackedCells,
        inputs: Inputs,
        reading: PaddedReading,
        length: int | None,
        *,
        keep_states: bool,
    ) -> ScgptOutput:
        check_reading(reading, inputs)
        counts = padding_counts(inputs, length)
        with_pads = padded(inputs, self.config, self._pad_id())
        if reading == "nested":
            states = self.run(inputs, self.embed_tokens(inputs), keep_states=keep_states)
            pads = [states[0].new_zeros(inputs.num_cells, self.config.hidden_size) for _ in states]
        else:
            all_rows = self.run_padded(inputs, with_pads, reading, keep_states=keep_states)
            states = [rows.index_select(0, with_pads.token_rows) for rows in all_rows]
            pads = [rows.index_select(0, with_pads.pad_rows) for rows in all_rows]
        return ScgptOutput(
            states[-1],
            model=self,
            inputs=inputs,
            cells=packed,
            hidden_states=tuple(states) if keep_states else None,
            padding=Padding(pads[-1], counts, self.config.pad_value),
            padding_states=tuple(pads) if keep_states else None,
        )

    # ---- heads --------------------------------------------------------------------------------------------------

    def _pad_id(self) -> int:
        if self.vocab is None:
            raise InvalidArgumentError(
                "without vocab.json the id of <pad> is unknown, so padding cannot be read", where="padding"
            )
        return self.vocab.token[self.config.pad_token]

    def read_cells(
        self, data: Any, *, counts_layer: str | None = None, assume_counts: bool = False
    ) -> CellSource:
        """X as it is, counts or normalised, or the layer that is named, as the original's embed_data takes it."""
        return self.tokenizer.read(data, layer=counts_layer, assume_counts=assume_counts)

    # ---- embeddings ---------------------------------------------------------------------------------------------

    def embed(self, data: Any, *, batch_labels: Any = None, **options: Any) -> np.ndarray:
        """Cell embeddings, float32 (cells, hidden_size), rows in the input's order and, by default, one long.

        As FoundationModel.embed, with pooling "cls", "mean" (over genes), "avg-pool" or "w-pool". batch_labels: whole
        numbers, one for each row of ``data``, for models with domain-specific batch normalisation.
        """
        with row_labels(batch_labels):
            return super().embed(data, **options)

    def embed_batch(self, packed: PackedCells, *, layer: int, pooling: str) -> Tensor:
        """Cell embeddings of one batch, float32 (C, hidden_size); see ``embed``."""
        self.check_embedding(layer, pooling)
        inputs = checked_inputs(self.config, packed, self.device, batch_labels=labels_of(packed.cell_ids))
        count = self._num_layers_for(layer)
        hidden = self.embed_tokens(inputs)
        if pooling == "cls" and count:
            hidden = self.run(inputs, hidden, num_layers=count - 1)[-1]
            last = self.layers[count - 1]
            assert isinstance(last, ScgptLayer)
            cells = last.forward_first_tokens(hidden, inputs.cu_seqlens)
        else:
            cells = pool_cells(self.run(inputs, hidden, num_layers=count)[-1], inputs, pooling)
        return unit_rows(cells) if self.config.unit_embeddings else cells

    def check_embedding(self, layer: int, pooling: str) -> None:
        """Raise InvalidArgumentError for a layer or pooling that there is not, or lacking batch labels."""
        self._num_layers_for(layer)
        if pooling not in POOLINGS:
            raise InvalidArgumentError(f"{pooling!r}; scGPT has {', '.join(POOLINGS)}", where="pooling")
        if self.dsbn is not None and not row_labels_known():
            raise InvalidArgumentError(
                "this model normalises each batch by itself and needs the cells' batch labels",
                where="batch_labels",
                hint="Pass batch_labels= to model.embed: whole numbers, one for each cell.",
            )

    def hidden_at(self, packed: PackedCells, layer: int) -> Tensor:
        """Hidden states of one layer, (T, hidden_size): 0 is the last, -1 the one before, and so on."""
        inputs = checked_inputs(self.config, packed, self.device, batch_labels=labels_of(packed.cell_ids))
        return self.run(inputs, self.embed_tokens(inputs), num_layers=self._num_layers_for(layer))[-1]

    def gene_table_embeddings(self) -> tuple[list[str], np.ndarray]:
        """The trained gene table as the encoder reads it, LN(E): names and float32 (genes, hidden_size)."""
        with torch.no_grad():
            table = self.encoder.normed().cpu()
        if self.vocab is None:
            return [str(token) for token in range(self.config.vocab_size)], table.numpy().copy()
        genes = self.vocab.genes
        rows = torch.tensor([self.vocab.token[gene] for gene in genes], dtype=torch.int64)
        return genes, table[rows].numpy().copy()

    def token_names(self) -> dict[int, str]:
        """Gene symbol (or special name) of every token id."""
        if self.vocab is None:
            return {token: str(token) for token in range(self.config.vocab_size)}
        return {token: name for name, token in self.vocab.token.items()}

    def save(self, folder: str | Path) -> Path:
        from scfm.models.scgpt.checkpoint import save_scgpt

        return save_scgpt(self, Path(folder))

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
