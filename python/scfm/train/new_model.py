"""A model with fresh weights for the vocabulary of a corpus, in the shape that the settings of a run say."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from scfm.errors import ConfigError
from scfm.models.base import FoundationModel
from scfm.models.geneformer.model import Geneformer
from scfm.models.scbert.model import Scbert
from scfm.models.scfoundation.model import Scfoundation
from scfm.models.scgpt.model import Scgpt
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.scbert_panel import ScbertPanel
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.train.config import PretrainConfig
from scfm.train.first_weights import StartingCorpus, set_first_weights
from scfm.train.model_shape import model_shape

__all__ = ["new_model"]


def new_model(
    config: PretrainConfig, corpus: StartingCorpus, *, num_batch_labels: int = 0
) -> FoundationModel:
    """Fresh weights, drawn by the seed, with the corpus's vocabulary attached. Raises ConfigError naming the setting.

    num_batch_labels: batches of the corpus, where ``objective.batch`` names a column.
    """
    model = _fresh(config, corpus.tokenizer.vocab, num_batch_labels)
    set_first_weights(model, config, corpus)
    return model


def _fresh(config: PretrainConfig, vocab: Any, num_batch_labels: int) -> FoundationModel:
    family, its_vocabulary, size_of = _FAMILIES[config.family]
    if not isinstance(vocab, its_vocabulary):
        raise ConfigError(
            f"{config.family!r}; the corpus has the vocabulary of another, {type(vocab).__name__}",
            where="family",
        )
    shape = model_shape(config, size_of(vocab), num_batch_labels=num_batch_labels)
    model: FoundationModel = family.from_config(shape, vocab, seed=config.seed)
    return model


# model, vocabulary, and the size that the model has of it
_FAMILIES: dict[str, tuple[Any, type, Callable[[Any], int]]] = {
    "geneformer": (Geneformer, GeneformerDictionaries, lambda vocab: max(vocab.token.values()) + 1),
    "scgpt": (Scgpt, ScgptVocab, lambda vocab: int(vocab.size)),
    "scbert": (Scbert, ScbertPanel, len),
    "scfoundation": (Scfoundation, ScfoundationGenes, lambda vocab: int(vocab.num_genes)),
}
