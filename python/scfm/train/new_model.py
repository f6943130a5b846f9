"""A model with fresh weights for the vocabulary of a corpus, in the shape that the settings of a run say.

A new model has the heads that its objective trains and no others: a weight that nothing trains would be saved as if it
meant something, and ranks that wait for its gradient would wait in vain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

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
from scfm.train.first_weights import StartingCorpus, set_first_weights
from scfm.train.objectives.settings import ScgptSettings, objective_settings

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
