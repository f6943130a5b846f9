"""How a model's weights begin where a run says so: what its genes start from, and how little its layers do at first.

gene_std          of the gene table; a small one in front of a norm learns faster, for only its direction counts
gene_embeddings   "coexpression": vectors of genes that vary together (corpus/coexpression.py)
branch_scale      what each layer adds to the stream begins this much smaller, so that the stack begins near identity
centred_start     the last norm's bias begins at minus the mean cell embedding of some training cells: cells then point
                  in different directions from the first step on, which is what a contrast of cosines works with
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from scfm.data.keyed_draws import words_at
from scfm.data.packed import PackedCells, concatenate
from scfm.errors import ConfigError
from scfm.models.base import FoundationModel
from scfm.models.geneformer.model import Geneformer
from scfm.models.nn.encoder import EncoderLayer
from scfm.models.scbert.model import Scbert
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scgpt.model import Scgpt
from scfm.train.config import PretrainConfig
from scfm.train.corpus.cells import with_lowest_words

__all__ = ["StartingCorpus", "set_first_weights"]

_OTHER_COLUMNS = 0.1
_CENTRING_CELLS = 256
_CELLS_AT_ONCE = 1 << 20
_PURPOSE_CENTRE = 0x63656E74  # "cent"


class StartingCorpus(Protocol):
    """What of a corpus a new model may start from; only ``tokenizer`` where nothing else is asked for."""

    held_out: NDArray[np.bool_]

    @property
    def tokenizer(self) -> Any: ...

    def coexpression(self, num_components: int) -> NDArray[np.float32]: ...

    def packs_of(self, cells: NDArray[np.int64], *, epoch: int = 0) -> Iterator[PackedCells]: ...


@torch.no_grad()
def set_first_weights(model: FoundationModel, config: PretrainConfig, corpus: StartingCorpus) -> None:
    """Change fresh weights as the settings say. Raises ConfigError for what the family's model does not have."""
    if config.gene_std is not None:
        generator = torch.Generator().manual_seed(config.seed)
        _gene_table(model, "gene_std").normal_(std=config.gene_std, generator=generator)
    if config.gene_embeddings == "coexpression":
        _start_from(corpus.coexpression(config.coexpression_size), model)
    if config.branch_scale != 1.0:
        _scale_branches(model, config.branch_scale)
    if config.centred_start:
        _centre(model, concatenate(list(corpus.packs_of(_training_cells(corpus, config.seed)))))


def _start_from(vectors: NDArray[np.float32], model: FoundationModel) -> None:
    """Vectors of the genes into the first columns of the gene table; the other columns begin a tenth as large, so that
    what tells genes apart is at first what the vectors say. Genes without a vector stay random.
    """
    table = _gene_table(model, "gene_embeddings")
    size = vectors.shape[1]
    if size > table.shape[1]:
        raise ConfigError(f"{size}; the gene table has {table.shape[1]} columns", where="coexpression_size")
    rows = torch.from_numpy(vectors).to(table)
    has_vector = rows.any(dim=1).nonzero().flatten()
    scale = float(table.std())
    table[has_vector] *= _OTHER_COLUMNS
    table[has_vector, :size] = rows[has_vector] * scale


def _gene_table(model: FoundationModel, setting: str) -> Tensor:
    """A row for each token id."""
    if isinstance(model, Geneformer):
        return model.gene_table
    if isinstance(model, Scgpt):
        return model.encoder.embedding.weight
    table = model.pos_emb if isinstance(model, Scbert) else None
    if isinstance(model, Scfoundation):
        table = model.pos_emb.weight
    if table is None:
        raise ConfigError("this model has no table of genes to start from", where=setting)
    return table


def _scale_branches(model: FoundationModel, scale: float) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, EncoderLayer)]
    if not layers:
        raise ConfigError("this model has no such layers", where="branch_scale")
    for layer in layers:
        for last in (layer.attention_out, layer.ffn_out):
            for parameter in last.parameters():
                parameter.mul_(scale)


def _centre(model: FoundationModel, packed: PackedCells) -> None:
    last = model.layers[-1] if isinstance(model, Scgpt) and not model.config.pre_norm else None
    if last is None:
        raise ConfigError("only scGPT with its norms behind the layers has it", where="centred_start")
    assert isinstance(model, Scgpt) and isinstance(last.ffn_norm, nn.LayerNorm) and packed.values is not None
    hidden = model.forward(packed).hidden
    weights = packed.values if model.config.cell_style == "w-pool" else torch.ones(packed.num_tokens)
    if model.config.cell_style == "cls":
        weights = torch.zeros(packed.num_tokens)
        weights[packed.cu_seqlens[:-1].to(torch.int64)] = 1.0
    cells = torch.repeat_interleave(torch.arange(packed.num_cells), packed.lengths.to(torch.int64))
    totals = torch.zeros(packed.num_cells).index_add(0, cells, weights)
    share = (weights / totals[cells]).to(hidden.device).unsqueeze(1)
    last.ffn_norm.bias.sub_((hidden * share).sum(dim=0) / packed.num_cells)


def _training_cells(corpus: StartingCorpus, seed: int) -> NDArray[np.int64]:
    """Some that are trained on, the same on every rank."""

    def stretches() -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
        for start in range(0, len(corpus.held_out), _CELLS_AT_ONCE):
            cells = start + np.flatnonzero(~corpus.held_out[start : start + _CELLS_AT_ONCE])
            yield cells, words_at((cells, cells >> 32, 0, 0), seed ^ _PURPOSE_CENTRE)

    return with_lowest_words(stretches(), _CENTRING_CELLS)
