"""scGPT on packed cells: genes with values in, hidden states, expression, cell embeddings and predictions out.

    x = LN(E[gene]) + values(value) [+ flags];  L post-norm layers;  expression = fc(h);  cell = h at <cls>

Reproduces the released TransformerModel, and by their weights the multi-omic model, the perturbation generator and
scGPT-spatial's mixture model, without padding. For embeddings the gene table is normalised once, bins are looked up,
and the last layer computes <cls> alone. Attention has no dropout of its own in training, as in Geneformer's engine.
Source: Cui et al. 2024 and the released code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.packed import PackedCells
from scfm.data.source import CellSource
from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.scgpt.classifiers import BatchAdversary, CellClassifier
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.decoders import AffineDecoder, Expression
from scfm.models.scgpt.encoders import PlainTable, TokenTable
from scfm.models.scgpt.initialise import initialise
from scfm.models.scgpt.inputs import NUM_FLAGS, Inputs, checked_inputs
from scfm.models.scgpt.layers import PreNormLayer, ScgptLayer
from scfm.models.scgpt.mvc import MvcDecoder
from scfm.models.scgpt.norms import BatchNorm, DomainBatchNorm
from scfm.models.scgpt.output import ScgptOutput
from scfm.models.scgpt.padding import (
    PaddedInputs,
    PaddedReading,
    Padding,
    check_reading,
    padded,
    padding_counts,
)
from scfm.models.scgpt.parts import expression_decoder, mvc_decoder, required, value_encoder
from scfm.models.scgpt.pooling import POOLINGS, pool_cells, unit_rows
from scfm.models.scgpt.row_labels import labels_of, row_labels, row_labels_known
from scfm.ops import embed_norm
from scfm.tokenize.scgpt import ScgptTokenizer
from scfm.tokenize.scgpt_vocab import ScgptVocab


class Scgpt(FoundationModel):
    """A scGPT encoder with the heads that its config names; the others are None.

    config: shapes and parts; vocab: vocab.json, or None (then it runs on token ids only).
    """

    family = "scgpt"
    config: ScgptConfig
    vocab: ScgptVocab | None

    def __init__(self, config: ScgptConfig, vocab: ScgptVocab | None = None) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self._tokenizer: ScgptTokenizer | None = None
        if vocab is not None and vocab.size != config.vocab_size:
            raise InvalidArgumentError(
                f"{vocab.size:,} tokens; the model's gene table has {config.vocab_size:,} rows",
                path=vocab.source or None,
                hint="Give the vocab.json that came with these weights.",
            )
        size = config.hidden_size
        pad_id = None if vocab is None else vocab.token.get(config.pad_token)
        self.encoder = TokenTable(config.vocab_size, size, frozen_row=pad_id)
        self.flag_encoder = PlainTable(2, size) if config.has_flags else None
        self.value_encoder = value_encoder(config)
        self.batch_encoder = TokenTable(config.num_batch_labels, size) if config.use_batch_labels else None
        self.mod_encoder = TokenTable(config.num_modalities, size) if config.num_modalities else None
        self.pert_encoder = (
            PlainTable(NUM_FLAGS, size, frozen_row=config.pert_pad_id) if config.perturbation else None
        )
        self.dsbn = DomainBatchNorm(size, config.num_batch_labels) if config.batch_norm == "domain" else None
        self.bn = BatchNorm(size, affine=True) if config.batch_norm == "plain" else None
        layer = PreNormLayer if config.pre_norm else ScgptLayer
        self.layers = nn.ModuleList(
            layer(size, config.num_heads, config.ffn_size, dropout=config.dropout)
            for _ in range(config.num_layers)
        )
        self.decoder = expression_decoder(config)
        self.cls_decoder = (
            CellClassifier(size, config.num_classes, config.num_class_layers) if config.num_classes else None
        )
        self.mvc_decoder = mvc_decoder(config)
        self.impute_mvc_decoder = (
            MvcDecoder(size, size, style="inner product", explicit_zeros=False)
            if config.has_imputation
            else None
        )
        self.grad_reverse_discriminator = (
            BatchAdversary(size, config.num_batch_labels) if config.adversary else None
        )

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
        """The authors' default: "cls"."""
        return "cls"

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
        states = self._run(inputs, self._embed_tokens(inputs, first_states), keep_states=output_hidden_states)
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
        return self.decode(self._run(inputs, self._embed_tokens(inputs, cell_embeddings))[-1], inputs)

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
            states = self._run(inputs, self._embed_tokens(inputs), keep_states=keep_states)
            pads = [states[0].new_zeros(inputs.num_cells, self.config.hidden_size) for _ in states]
        else:
            all_rows = self._run_padded(inputs, with_pads, reading, keep_states=keep_states)
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

    def _run_padded(
        self, inputs: Inputs, with_pads: PaddedInputs, reading: PaddedReading, *, keep_states: bool
    ) -> list[Tensor]:
        assert reading != "nested"
        padded_offsets = with_pads.inputs.cu_seqlens
        states = [self._embed_tokens(with_pads.inputs)]
        for layer in self.layers:
            assert isinstance(layer, ScgptLayer)
            hidden = layer.forward_padded(
                states[-1], inputs.cu_seqlens, with_pads.token_rows, padded_offsets, reading
            )
            states = [*states, hidden] if keep_states else [hidden]
        return states

    def _run(
        self, inputs: Inputs, hidden: Tensor, *, num_layers: int | None = None, keep_states: bool = False
    ) -> list[Tensor]:
        """States after the first ``num_layers`` layers (default all): the last, or all from the embedding on."""
        unknown, num_known = inputs.unknown, inputs.num_known
        known = None if unknown is None else (~unknown).nonzero().flatten()
        states = [hidden]
        for layer in self.layers[:num_layers]:
            assert isinstance(layer, ScgptLayer)
            if known is None or num_known is None:
                hidden = layer(states[-1], inputs.cu_seqlens)
            else:
                hidden = layer.forward_generative(states[-1], inputs.cu_seqlens, num_known, known)
            states = [*states, hidden] if keep_states else [hidden]
        return states

    def _embed_tokens(self, inputs: Inputs, first_states: Tensor | None = None) -> Tensor:
        x = self._token_inputs(inputs)
        if self.dsbn is not None:
            x = self.dsbn(x, self._labels(inputs)[inputs.cell_of_token])
        elif self.bn is not None:
            x = self.bn(x)
        if first_states is not None:
            size = (inputs.num_cells, self.config.hidden_size)
            if first_states.shape != size:
                raise InvalidArgumentError(
                    f"{tuple(first_states.shape)}; expected {size}", where="first_states or cell_embeddings"
                )
            x = x.index_copy(0, inputs.first_rows, first_states.to(x.device, x.dtype))
        return x

    def _token_inputs(self, inputs: Inputs) -> Tensor:
        """The sum of everything that enters at a token, float32 (T, hidden_size)."""
        if inputs.values is None:
            return self.gene_rows(inputs)
        if self.value_encoder is None:
            return self.gene_rows(inputs) * inputs.values.unsqueeze(1)
        unknown = inputs.unknown
        values = inputs.values if unknown is None else inputs.values.masked_fill(unknown, 0.0)
        table, rows = self.value_encoder.look_up(values)
        if unknown is not None:
            assert self.flag_encoder is not None
            rows = torch.where(unknown, len(table), rows)
            table = torch.cat([table, self.flag_encoder.rows()[1:2]])
        ids, tables = [rows], [table]
        if self.pert_encoder is not None:
            ids.append(self._flags(inputs))
            tables.append(self.pert_encoder.rows())
        if not torch.is_grad_enabled():
            return embed_norm([inputs.token_ids, *ids], [self.encoder.normed(), *tables], None, None)
        if not (self.training and self.config.dropout):
            return embed_norm(ids, tables, None, None, addend=self.gene_rows(inputs))
        dropped = embed_norm(ids[:1], tables[:1], None, None)
        kept = F.dropout(torch.ones_like(dropped), self.config.dropout)
        dropped = dropped * (kept if unknown is None else torch.where(unknown.unsqueeze(1), 1.0, kept))
        x = self.gene_rows(inputs) + dropped
        return embed_norm(ids[1:], tables[1:], None, None, addend=x) if ids[1:] else x

    def gene_rows(self, inputs: Inputs) -> Tensor:
        """LN(E[gene]) of every token, float32 (T, hidden_size)."""
        rows: Tensor = self.encoder(inputs.token_ids)
        return rows

    # ---- heads --------------------------------------------------------------------------------------------------

    def decode(self, hidden: Tensor, inputs: Inputs) -> Expression:
        """Expression of each token from its hidden state (T, hidden_size)."""
        if isinstance(self.decoder, AffineDecoder):
            assert inputs.values is not None
            found: Expression = self.decoder(hidden, inputs.values, inputs.cell_of_token, inputs.num_cells)
            return found
        context = self._token_context(inputs)
        decoded: Expression = self.decoder(hidden if context is None else torch.cat([hidden, context], dim=1))
        return decoded

    def decode_from_cells(self, cells: Tensor, inputs: Inputs) -> Expression:
        """Expression of each token's gene from its cell's embedding (C, hidden_size)."""
        mvc = required(self.mvc_decoder, "mvc", "decoder from cell embeddings (mvc_decoder)")
        genes = self.gene_rows(inputs)
        context = self._token_context(inputs)
        if context is not None:
            cells = torch.cat([cells, context.index_select(0, inputs.first_rows)], dim=1)
            if self.config.joint_mvc:
                genes = torch.cat([genes, context], dim=1)
        found: Expression = mvc(genes, cells, inputs.cell_of_token)
        return found

    def pool(self, hidden: Tensor, inputs: Inputs, *, padding: Padding | None = None) -> Tensor:
        """Cell embeddings in the style of the config, float32 (C, hidden_size)."""
        return pool_cells(hidden, inputs, self.config.cell_style, padding)

    def classify(self, cells: Tensor) -> Tensor:
        """Class scores of cell embeddings, float32 (C, num_classes)."""
        found: Tensor = required(self.cls_decoder, "cls", "classifier (cls_decoder)")(cells)
        return found

    def batch_scores(self, cells: Tensor) -> Tensor:
        """Scores of the batch labels, float32 (C, num_batch_labels); the gradient into ``cells`` is reversed."""
        head = required(
            self.grad_reverse_discriminator, "batch_logits", "batch classifier (grad_reverse_discriminator)"
        )
        found: Tensor = head(cells)
        return found

    def _token_context(self, inputs: Inputs) -> Tensor | None:
        """What batch label and modality add to the decoders' input, float32 (T, hidden_size), or None."""
        context = None
        if self.batch_encoder is not None:
            context = self.batch_encoder(self._labels(inputs)).index_select(0, inputs.cell_of_token)
        if self.mod_encoder is not None:
            if inputs.modalities is None:
                raise InvalidArgumentError("this model needs each token's modality", where="modalities")
            modality = self.mod_encoder(inputs.modalities)
            context = modality if context is None else context + modality
        return context

    def _labels(self, inputs: Inputs) -> Tensor:
        if inputs.batch_labels is None:
            raise InvalidArgumentError(
                f"this model needs each cell's batch label, 0 to {self.config.num_batch_labels - 1}",
                where="batch_labels",
            )
        return inputs.batch_labels

    def _flags(self, inputs: Inputs) -> Tensor:
        if inputs.pert_flags is None:
            raise InvalidArgumentError(
                "the perturbation generator needs each token's flag: 0, or 1 where perturbed",
                where="pert_flags",
            )
        return inputs.pert_flags

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
        hidden = self._embed_tokens(inputs)
        if pooling == "cls" and count:
            hidden = self._run(inputs, hidden, num_layers=count - 1)[-1]
            last = self.layers[count - 1]
            assert isinstance(last, ScgptLayer)
            cells = last.forward_first_tokens(hidden, inputs.cu_seqlens)
        else:
            cells = pool_cells(self._run(inputs, hidden, num_layers=count)[-1], inputs, pooling)
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
        return self._run(inputs, self._embed_tokens(inputs), num_layers=self._num_layers_for(layer))[-1]

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
