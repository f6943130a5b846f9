"""Geneformer on packed cells: rank-ordered gene tokens in, hidden states, masked-gene logits, embeddings out.

    h0 = LN(word[token] + position[rank] + type[0]);  L post-norm layers;  logits = LN(relu(W h)) word^T + b

Reproduces the released BertForMaskedLM checkpoints (V1 and V2) without padding. Layers above the one asked for
are not computed, nor is the head unless read; a "cls" embedding computes its last layer for that token only.
Source: Theodoris et al. 2023 (V1), Chen et al. 2024 (V2), and the released files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.data.packed import PackedCells
from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.nn.encoder import ACTIVATIONS, EncoderLayer
from scfm.models.nn.linear import Linear
from scfm.models.output import ModelOutput
from scfm.models.pooling import mean_of_genes
from scfm.ops import embed_norm, masked_head_loss
from scfm.ops.products import row_stable_linear
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.geneformer import GeneformerTokenizer


class MaskedGeneHead(nn.Module):
    """logits = LN(act(W h + b)) E^T + c, with E the gene table itself. h: (N, hidden) -> (N, vocab)."""

    def __init__(self, config: GeneformerConfig) -> None:
        super().__init__()
        self.transform = Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, hidden: Tensor, gene_table: Tensor) -> Tensor:
        return row_stable_linear(self._inner(hidden), gene_table, self.bias)

    def losses(self, hidden: Tensor, gene_table: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of every row, in nats, float32 (N,); the logits are never in memory whole.

        Products as in the layers; the exponentials are float32 always.
        """
        dtype = self.transform.compute_dtype
        inner = self._inner(hidden).to(dtype)
        return masked_head_loss(inner, gene_table.to(dtype), self.bias.to(dtype), targets)

    def _inner(self, hidden: Tensor) -> Tensor:
        inner: Tensor = self.norm(self.activation(self.transform(hidden)).float())
        return inner


class Geneformer(FoundationModel):
    """A Geneformer encoder with its masked-gene head.

    config: shapes; vocab: the dictionaries it was trained with, or None (then it runs on token ids only);
    version: "V1" or "V2", taken from the dictionaries when they are given, never guessed.
    """

    family = "geneformer"

    def __init__(
        self,
        config: GeneformerConfig,
        vocab: GeneformerDictionaries | None = None,
        version: str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vocab = vocab
        self.version = version if vocab is None else vocab.version
        self._tokenizer: GeneformerTokenizer | None = None
        if vocab is not None and max(vocab.token.values()) >= config.vocab_size:
            gene = max(vocab.token, key=vocab.token.__getitem__)
            raise InvalidArgumentError(
                f"token {vocab.token[gene]} of {gene} is outside the model's vocabulary of {config.vocab_size}",
                path=vocab.source,
                hint="Give the dictionaries that belong to these weights (V1 and V2 differ).",
            )
        self.gene_table = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.position_table = nn.Parameter(torch.empty(config.max_tokens, config.hidden_size))
        self.type_table = nn.Parameter(torch.empty(config.type_vocab_size, config.hidden_size))
        self.embedding_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(
            EncoderLayer(
                config.hidden_size,
                config.num_heads,
                config.ffn_size,
                activation=config.activation,
                norm_eps=config.layer_norm_eps,
                dropout=config.hidden_dropout,
            )
            for _ in range(config.num_layers)
        )
        self.head: MaskedGeneHead | None = MaskedGeneHead(config)

    @classmethod
    def from_config(
        cls, config: GeneformerConfig, vocab: GeneformerDictionaries | None = None, *, seed: int = 0
    ) -> Geneformer:
        """A model with fresh weights: normal(0, initializer_range), norms at one, biases at zero."""
        model = cls(config, vocab)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=config.initializer_range, generator=generator)
            elif not (name.endswith("norm.weight")):
                nn.init.zeros_(parameter)
        with torch.no_grad():
            model.gene_table[config.pad_token_id].zero_()
        return model.eval()

    @property
    def tokenizer(self) -> GeneformerTokenizer:
        """Tokenizer of this model's dictionaries; raises InvalidArgumentError when it has none."""
        if self._tokenizer is None:
            if self.vocab is None:
                raise InvalidArgumentError(
                    "the model was loaded without dictionaries, so it cannot map genes to tokens",
                    hint="Pass dictionaries= to scfm.load, or give tokens as scfm.PackedCells.",
                )
            self._tokenizer = GeneformerTokenizer(self.vocab, max_tokens=self.config.max_tokens)
        return self._tokenizer

    @property
    def default_layer(self) -> int:
        """The authors' default: -1, the second to last layer."""
        return -1

    @property
    def default_pooling(self) -> str:
        """The authors' default: "cls" where cells begin with <cls> (V2), else the mean over genes (V1)."""
        return "cls" if self._num_specials() else "mean"

    def forward(self, packed: PackedCells, output_hidden_states: bool = False) -> ModelOutput:
        """Hidden states of every token and, when read, masked-gene logits.

        packed: token ids below ``config.vocab_size``, cells of at most ``config.max_tokens`` tokens.
        Raises InvalidArgumentError naming the cell otherwise.
        """
        packed = self._checked(packed)
        states = [self._embed_tokens(packed)]
        for layer in self.layers:
            hidden = layer(states[-1], packed.cu_seqlens)
            states = [*states, hidden] if output_hidden_states else [hidden]
        return ModelOutput(
            states[-1],
            hidden_states=tuple(states) if output_hidden_states else None,
            head=self.masked_gene_logits if self.head is not None else None,
        )

    def masked_gene_logits(self, hidden: Tensor) -> Tensor:
        """Masked-gene logits of the given rows: (N, hidden_size) -> float32 (N, vocab_size)."""
        return self._require_head("logits")(hidden, self.gene_table)  # type: ignore[no-any-return]

    def masked_gene_losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy of masked tokens. hidden: (N, hidden_size) of them; targets: int64 (N,) token ids.

        Returns nats, float32 (N,). Raises InvalidArgumentError for targets outside the vocabulary.
        """
        return self._require_head("losses").losses(hidden, self.gene_table, targets)

    def hidden_at(self, packed: PackedCells, layer: int) -> Tensor:
        """Hidden states of one layer, (T, hidden_size): 0 is the last, -1 the one before, and so on."""
        packed = self._checked(packed)
        hidden = self._embed_tokens(packed)
        for block in self.layers[: self._num_layers_for(layer)]:
            hidden = block(hidden, packed.cu_seqlens)
        return hidden

    def embed_batch(self, packed: PackedCells, *, layer: int, pooling: str) -> Tensor:
        """Cell embeddings of one batch, float32 (C, hidden_size); see FoundationModel.embed."""
        self.check_embedding(layer, pooling)
        if pooling == "mean":
            hidden = self.hidden_at(packed, layer)
            specials = self._num_specials()
            return mean_of_genes(
                hidden, packed.cu_seqlens.to(hidden.device), leading=specials, trailing=specials
            )
        packed = self._checked(packed)
        count = self._num_layers_for(layer)
        hidden = self._embed_tokens(packed)
        for block in self.layers[: max(count - 1, 0)]:
            hidden = block(hidden, packed.cu_seqlens)
        if count == 0:
            return hidden[packed.cu_seqlens[:-1].to(torch.int64)]
        last = self.layers[count - 1]
        assert isinstance(last, EncoderLayer)
        return last.forward_first_tokens(hidden, packed.cu_seqlens)

    def check_embedding(self, layer: int, pooling: str) -> None:
        """Raise InvalidArgumentError for a layer outside the model, or "cls" where there is no <cls>."""
        self._num_layers_for(layer)
        if pooling not in ("cls", "mean"):
            raise InvalidArgumentError(f'{pooling!r}; Geneformer has "cls" and "mean"', where="pooling")
        if pooling == "cls" and self.version == "V1":
            raise InvalidArgumentError(
                '"cls" needs a <cls> token, which V1 models do not have',
                where="pooling",
                hint='Use pooling="mean", the authors\' default for V1.',
            )

    @torch.inference_mode()
    def attentions(self, packed: PackedCells, layer: int = 0) -> list[Tensor]:
        """Attention probabilities of one layer (0 = last), float32 (num_heads, L, L) a cell."""
        if self._num_layers_for(layer) == 0:
            raise InvalidArgumentError(
                f"layer {layer} is the embedding, which has no attention", where="layer"
            )
        hidden = self.hidden_at(packed, layer - 1)
        block = self.layers[self._num_layers_for(layer) - 1]
        assert isinstance(block, EncoderLayer)
        return block.attention_probabilities(hidden, packed.cu_seqlens.to(hidden.device))

    def gene_table_embeddings(self) -> tuple[list[str], np.ndarray]:
        """The trained gene table itself: names of tokens and float32 (genes, hidden_size)."""
        tokens = self.vocab.token if self.vocab is not None else {}
        names = sorted((name for name in tokens if not name.startswith("<")), key=tokens.__getitem__)
        if self.vocab is None:
            names = [str(token) for token in range(self.config.vocab_size)]
            return names, self.gene_table.detach().cpu().numpy().copy()
        rows = torch.tensor([tokens[name] for name in names], dtype=torch.int64)
        return names, self.gene_table.detach().cpu()[rows].numpy().copy()

    def token_names(self) -> dict[int, str]:
        """Ensembl id (or special name) of every token id."""
        if self.vocab is None:
            return {token: str(token) for token in range(self.config.vocab_size)}
        return {token: name for name, token in self.vocab.token.items()}

    def save(self, folder: str | Path) -> Path:
        from scfm.models.geneformer.checkpoint import save_geneformer

        return save_geneformer(self, Path(folder))

    def _require_head(self, where: str) -> MaskedGeneHead:
        if self.head is None:
            raise InvalidArgumentError(
                "the checkpoint held an encoder without a masked-gene head", path=self.source, where=where
            )
        return self.head

    def _embed_tokens(self, packed: PackedCells) -> Tensor:
        starts = packed.cu_seqlens[:-1].to(torch.int64)
        lengths = packed.lengths.to(torch.int64)
        positions = torch.arange(packed.num_tokens, device=starts.device) - torch.repeat_interleave(
            starts, lengths
        )
        norm = self.embedding_norm
        hidden = embed_norm(
            [packed.token_ids, torch.zeros_like(packed.token_ids), positions],
            [self.gene_table, self.type_table, self.position_table],
            norm.weight,
            norm.bias,
            eps=norm.eps,
        )
        if self.training and self.config.hidden_dropout:
            hidden = F.dropout(hidden, self.config.hidden_dropout)
        return hidden

    def _num_layers_for(self, layer: int) -> int:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise InvalidArgumentError(
                f"{layer!r}; expected a whole number, 0 for the last layer",
                where="layer",
                hint="The layer that holds the counts is counts_layer=.",
            )
        if not -self.config.num_layers <= layer <= 0:
            raise InvalidArgumentError(
                f"{layer}; expected {-self.config.num_layers} (embedding) to 0 (last layer)", where="layer"
            )
        return int(self.config.num_layers) + layer

    def _num_specials(self) -> int:
        """Special tokens at each end of a cell: 1 in V2 (<cls>, <eos>), 0 in V1."""
        if self.version is None:
            raise InvalidArgumentError(
                "without dictionaries it is unknown whether cells begin with <cls> (V2) or not (V1)",
                where="version",
                hint='Pass dictionaries= or version="V1"|"V2" to scfm.load.',
            )
        return 1 if self.version == "V2" else 0

    def _checked(self, packed: PackedCells) -> PackedCells:
        if not isinstance(packed, PackedCells):
            raise InvalidArgumentError(
                f"is a {type(packed).__name__}; expected PackedCells",
                where="packed",
                hint="Use model.tokenize.",
            )
        if packed.num_tokens:
            low, high = int(packed.token_ids.min()), int(packed.token_ids.max())
            if low < 0 or high >= self.config.vocab_size:
                raise InvalidArgumentError(
                    f"token ids run from {low} to {high}; the vocabulary is 0 to {self.config.vocab_size - 1}",
                    where="PackedCells.token_ids",
                    hint="The cells were tokenized for another model.",
                )
            lengths = packed.lengths
            if int(lengths.max()) > self.config.max_tokens:
                cell = int(packed.cell_ids[int(lengths.argmax())])
                raise InvalidArgumentError(
                    f"cell {cell} has {int(lengths.max())} tokens; the model takes {self.config.max_tokens}",
                    where="PackedCells",
                )
        return packed.to(self.device) if packed.token_ids.device != self.device else packed
