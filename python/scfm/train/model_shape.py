"""The configuration of a new model: the family's own, from the settings of a run and the size of its vocabulary.

A new model has the heads that its objective trains and no others: a weight that nothing trains would be saved as if it
meant something, and ranks that wait for its gradient would wait in vain.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from scfm.errors import ConfigError
from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scfoundation.config import ScfoundationConfig
from scfm.models.scgpt.config import ScgptConfig
from scfm.train.objectives.settings import ScgptSettings, objective_settings

if TYPE_CHECKING:
    from scfm.train.config import PretrainConfig

__all__ = ["ModelShape", "check_model_shape", "model_shape"]

ModelShape = GeneformerConfig | ScgptConfig | ScbertConfig | ScfoundationConfig
_SOME_VOCABULARY = 1000  # whose true size only the data tell


def model_shape(config: PretrainConfig, vocab_size: int, *, num_batch_labels: int = 0) -> ModelShape:
    """vocab_size: token ids, or genes of the panel; num_batch_labels: batches that ``objective.batch`` tells apart.

    Raises ConfigError naming the field.
    """
    given = config.model_fields()
    if config.family == "geneformer":
        assert config.preset is not None
        shape = GeneformerConfig.preset(config.preset, vocab_size=vocab_size)
        # Attention probabilities are not dropped in training, so the model says so.
        return replace(shape, **{"attention_dropout": 0.0, **given})
    if config.family == "scgpt":
        return ScgptConfig(
            **{
                **_scgpt_heads(config),
                "num_batch_labels": num_batch_labels,
                **given,
                "vocab_size": vocab_size,
            }
        )
    if config.family == "scbert":
        return ScbertConfig(**{**given, "num_genes": vocab_size})
    return ScfoundationConfig(**{**given, "num_genes": vocab_size})


def check_model_shape(config: PretrainConfig) -> None:
    """Raise what ``model_shape`` will raise about the settings, before any data is read."""
    labels = 2 if config.objective.get("batch") is not None else 0
    try:
        model_shape(config, _SOME_VOCABULARY, num_batch_labels=labels)
    except ConfigError as error:
        in_table = error.where in config.model
        where = f"model.{error.where}" if in_table else error.where
        raise ConfigError(error.message, where=where, hint=error.hint) from error


def _scgpt_heads(config: PretrainConfig) -> dict[str, Any]:
    settings = objective_settings(config.family, config.objective)
    assert isinstance(settings, ScgptSettings)
    return {
        "has_flags": settings.kind == "generative",
        "mvc_style": "inner product" if settings.mvc else None,
        "adversary": bool(settings.dab),
    }
