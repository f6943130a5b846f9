"""scfm: one engine for single-cell foundation models.

    import scfm
    model = scfm.load("Geneformer-V2-104M/")     # the authors' folder
    scfm.tl.embed(adata, model)                  # adata.obsm["X_geneformer"]

Names are imported when first used, so that ``import scfm`` costs next to nothing and touches no network.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "load": "scfm.models.load",
    "read": "scfm.data.read",
    "PackedCells": "scfm.data.packed",
    "CellSource": "scfm.data.source",
    "GeneformerTokenizer": "scfm.tokenize.geneformer",
    "ScbertTokenizer": "scfm.tokenize.scbert",
    "ScgptTokenizer": "scfm.tokenize.scgpt",
    "ScfoundationTokenizer": "scfm.tokenize.scfoundation",
    "pretrain": "scfm.train.pretrain",
    "PretrainConfig": "scfm.train.config",
    "ScfmError": "scfm.errors",
    "ScfmWarning": "scfm.errors",
}
_ROOMS = {"tl": "scfm.tasks", "pl": "scfm.plot", "ops": "scfm.ops", "errors": "scfm.errors"}

__all__ = ["__version__", *_HOME, *_ROOMS]

if TYPE_CHECKING:
    from scfm import errors as errors
    from scfm import ops as ops
    from scfm import plot as pl  # noqa: F401
    from scfm import tasks as tl  # noqa: F401
    from scfm.data.packed import PackedCells as PackedCells
    from scfm.data.read import read as read
    from scfm.data.source import CellSource as CellSource
    from scfm.errors import ScfmError as ScfmError
    from scfm.errors import ScfmWarning as ScfmWarning
    from scfm.models.load import load as load
    from scfm.tokenize.geneformer import GeneformerTokenizer as GeneformerTokenizer
    from scfm.tokenize.scbert import ScbertTokenizer as ScbertTokenizer
    from scfm.tokenize.scfoundation import ScfoundationTokenizer as ScfoundationTokenizer
    from scfm.tokenize.scgpt import ScgptTokenizer as ScgptTokenizer
    from scfm.train.config import PretrainConfig as PretrainConfig
    from scfm.train.pretrain import pretrain as pretrain


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(_HOME[name]), name)
    elif name in _ROOMS:
        value = import_module(_ROOMS[name])
    else:
        raise AttributeError(f"module 'scfm' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
