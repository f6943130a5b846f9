"""A model with fresh weights for the vocabulary of a corpus, in the shape that the settings of a run say.

A new model has the heads that its objective trains and no others: a weight that nothing trains would be saved as if it
meant something, and ranks that wait for its gradient would wait in vain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scfm.errors import ConfigError
from scfm.models.base import FoundationModel
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.scbert_panel import ScbertPanel
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.train.config import PretrainConfig
from scfm.train.objective_settings import ScgptSettings, objective_settings

__all__ = ["HasTokenizer", "new_model"]

_OTHER_COLUMNS = 0.1


class HasTokenizer(Protocol):
    """A corpus, of which a new model needs the vocabulary."""

    @property
    def tokenizer(self) -> Any: ...

    def coexpression(self, num_components: int) -> NDArray[np.float32]: ...


def new_model(config: PretrainConfig, corpus: HasTokenizer, *, num_batch_labels: int = 0) -> FoundationModel:
    """Fresh weights, drawn by the seed, with the corpus's vocabulary attached. Raises ConfigError naming the setting.

    num_batch_labels: batches of the corpus, where ``objective.batch`` names a column.
    """
    model = _fresh(config, corpus.tokenizer.vocab, num_batch_labels)
    if config.gene_embeddings == "coexpression":
        _start_from(corpus.coexpression(config.coexpression_size), model)
    return model


def _fresh(config: PretrainConfig, vocab: Any, num_batch_labels: int) -> FoundationModel:
    if config.family == "geneformer" and isinstance(vocab, GeneformerDictionaries):
        return _geneformer(config, vocab)
    if config.family == "scgpt" and isinstance(vocab, ScgptVocab):
        return _scgpt(config, vocab, num_batch_labels)
    if config.family == "scbert" and isinstance(vocab, ScbertPanel):
        panel = ScbertConfig(**{**config.model_fields(), "num_genes": len(vocab)})
        return Scbert.from_config(panel, vocab, seed=config.seed)
    if config.family == "scfoundation" and isinstance(vocab, ScfoundationGenes):
        genes = ScfoundationConfig(**{**config.model_fields(), "num_genes": vocab.num_genes})
        return Scfoundation.from_config(genes, vocab, seed=config.seed)
    raise ConfigError(
        f"{config.family!r}; the corpus has the vocabulary of another, {type(vocab).__name__}", where="family"
    )


@torch.no_grad()
def _start_from(vectors: NDArray[np.float32], model: FoundationModel) -> None:
    """Vectors of the genes into the first columns of the gene table; the other columns begin a tenth as large, so that
    what tells genes apart is at first what the vectors say. Genes without a vector stay random.
    """
    table = _gene_table(model)
    size = vectors.shape[1]
    if size > table.shape[1]:
        raise ConfigError(f"{size}; the gene table has {table.shape[1]} columns", where="coexpression_size")
    rows = torch.from_numpy(vectors).to(table)
    has_vector = rows.any(dim=1).nonzero().flatten()
    scale = float(table.std())
    table[has_vector] *= _OTHER_COLUMNS
    table[has_vector, :size] = rows[has_vector] * scale


def _gene_table(model: FoundationModel) -> Tensor:
    """A row for each token id."""
    if isinstance(model, Geneformer):
        return model.gene_table
    if isinstance(model, Scgpt):
        return model.encoder.embedding.weight
    table = model.pos_emb if isinstance(model, Scbert) else None
    if isinstance(model, Scfoundation):
        table = model.pos_emb.weight
    if table is None:
        raise ConfigError("this model has no table of genes to start from", where="gene_embeddings")
    return table


def _geneformer(config: PretrainConfig, vocab: GeneformerDictionaries) -> Geneformer:
    assert config.preset is not None
    shape = GeneformerConfig.preset(config.preset, vocab_size=max(vocab.token.values()) + 1)
    # Attention probabilities are not dropped in training, so the model says so.
    shape = replace(shape, **{"attention_dropout": 0.0, **config.model_fields()})
    return Geneformer.from_config(shape, vocab, seed=config.seed)


def _scgpt(config: PretrainConfig, vocab: ScgptVocab, num_batch_labels: int) -> Scgpt:
    settings = objective_settings(config.family, config.objective)
    assert isinstance(settings, ScgptSettings)
    heads: dict[str, Any] = {
        "has_flags": settings.kind == "generative",
        "mvc_style": "inner product" if settings.mvc else None,
        "adversary": bool(settings.dab),
        "num_batch_labels": num_batch_labels,
    }
    shape = ScgptConfig(**{**heads, **config.model_fields(), "vocab_size": vocab.size})
    return Scgpt.from_config(shape, vocab, seed=config.seed)
