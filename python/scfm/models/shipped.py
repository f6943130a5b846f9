"""The model that lies in the package: scfm-mini, which needs no download.

Its folder, models/mini/, is one of scfm's own: weights in float16 (float32 once loaded), vocab.json with the symbols of
its genes, the model card with the results behind it, and the settings of the run that trained it. Genes are found by
symbol and by Ensembl id, whichever a data set has.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from scfm.errors import MissingFileError
from scfm.models.base import FoundationModel
from scfm.models.scgpt.model import Scgpt
from scfm.tokenize.scgpt import ScgptTokenizer

__all__ = ["SHIPPED", "is_shipped", "shipped_folder", "with_own_tokenizer"]

SHIPPED = "scfm-mini"
_FOLDER = "mini"


def is_shipped(path: str | Path) -> bool:
    """Whether the package's own model is meant: its name, unless a file or folder here bears it."""
    return str(path) == SHIPPED and not Path(path).exists()


def shipped_folder() -> Path:
    """Where scfm-mini lies. Raises MissingFileError where the package was installed without it."""
    folder = Path(str(files("scfm.models").joinpath(_FOLDER)))
    if not (folder / "model.safetensors").is_file():
        raise MissingFileError(
            "this installation lacks the model that comes with the package",
            path=folder,
            hint="Install scfm anew, or give a folder or a hub id.",
        )
    return folder


def with_own_tokenizer(model: FoundationModel) -> FoundationModel:
    """The model with the rules of genes that the head of this file names."""
    assert isinstance(model, Scgpt) and model.vocab is not None
    config = model.config
    model.tokenizer = ScgptTokenizer(
        model.vocab,
        max_tokens=config.max_tokens,
        num_bins=config.num_bins,
        input_style=config.input_style,
        cls_value=config.pad_value,
        gene_rules="all",
    )
    return model
