"""scGPT's network: its parts under the authors' names, the ways through the encoder, and the heads.

    x = LN(E[gene]) + values(value) [+ flags];  L post-norm layers;  expression = fc(h);  cell = h at <cls>

A head that the config does not name is None; asking for it raises an error that says so. For inference the gene table
is normalised once and bins are looked up. Attention has no dropout of its own in training, as in Geneformer's engine.
Source: Cui et al. 2024 and the released code.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.errors import InvalidArgumentError
from scfm.models.scgpt.classifiers import BatchAdversary, CellClassifier
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.decoders import AffineDecoder, Expression
from scfm.models.scgpt.encoders import PlainTable, TokenTable
from scfm.models.scgpt.inputs import NUM_FLAGS, Inputs
from scfm.models.scgpt.layers import PreNormLayer, ScgptLayer
from scfm.models.scgpt.mvc import MvcDecoder
from scfm.models.scgpt.norms import BatchNorm, DomainBatchNorm
from scfm.models.scgpt.padding import PaddedInputs, PaddedReading, Padding
from scfm.models.scgpt.parts import expression_decoder, mvc_decoder, required, value_encoder
from scfm.models.scgpt.pooling import pool_cells
from scfm.ops import embed_norm


class ScgptNetwork(nn.Module):
    """config: shapes and parts; pad_id: the row of the gene table that stands for padding, if it is known."""

    def __init__(self, config: ScgptConfig, pad_id: int | None) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
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

    def run_padded(
        self, inputs: Inputs, with_pads: PaddedInputs, reading: PaddedReading, *, keep_states: bool
    ) -> list[Tensor]:
        """``run`` over cells with a <pad> each; states of all rows, pads among them."""
        assert reading != "nested"
        padded_offsets = with_pads.inputs.cu_seqlens
        states = [self.embed_tokens(with_pads.inputs)]
        for layer in self.layers:
            assert isinstance(layer, ScgptLayer)
            hidden = layer.forward_padded(
                states[-1], inputs.cu_seqlens, with_pads.token_rows, padded_offsets, reading
            )
            states = [*states, hidden] if keep_states else [hidden]
        return states

    def run(
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

    def embed_tokens(self, inputs: Inputs, first_states: Tensor | None = None) -> Tensor:
        """What enters the first layer, float32 (T, hidden_size); ``first_states`` in place of each first token."""
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
        if not (self.training and self.config.dropout):
            if torch.is_grad_enabled():
                return embed_norm(ids, tables, None, None, addend=self.gene_rows(inputs))
            return embed_norm([inputs.token_ids, *ids], [self.encoder.normed(), *tables], None, None)
        dropped = embed_norm(ids[:1], tables[:1], None, None)
        kept = F.dropout(torch.ones_like(dropped), self.config.dropout)
        dropped = dropped * (kept if unknown is None else torch.where(unknown.unsqueeze(1), 1.0, kept))
        x = self.gene_rows(inputs) + dropped
        return embed_norm(ids[1:], tables[1:], None, None, addend=x) if ids[1:] else x

    def gene_rows(self, inputs: Inputs) -> Tensor:
        """LN(E[gene]) of every token, float32 (T, hidden_size)."""
        rows: Tensor = self.encoder(inputs.token_ids)
        return rows

    def decode(self, hidden: Tensor, inputs: Inputs) -> Expression:
        """Expression of each token from its hidden state (T, hidden_size)."""
        if isinstance(self.decoder, AffineDecoder):
            if inputs.values is None:
                raise InvalidArgumentError(
                    "the perturbation generator scales values, and these tokens have none",
                    where="PackedCells.values",
                )
            found: Expression = self.decoder(hidden, inputs.values, inputs.cell_of_token, inputs.num_cells)
            return found
        context = self._token_context(inputs)
        decoded: Expression = self.decoder(hidden if context is None else torch.cat([hidden, context], dim=1))
        return decoded

    def decode_from_cells(self, cells: Tensor, inputs: Inputs, rows: Tensor | None = None) -> Expression:
        """Expression of each token's gene from its cell's embedding (C, hidden_size); rows: of some tokens only."""
        mvc = required(self.mvc_decoder, "mvc", "decoder from cell embeddings (mvc_decoder)")
        tokens = inputs if rows is None else inputs.at(rows)
        genes = self.gene_rows(tokens)
        context = self._token_context(inputs)
        if context is not None:
            cells = torch.cat([cells, context.index_select(0, inputs.first_rows)], dim=1)
            if self.config.joint_mvc:
                genes = torch.cat([genes, context if rows is None else context.index_select(0, rows)], dim=1)
        found: Expression = mvc(genes, cells, tokens.cell_of_token)
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
