"""``scfm.load``: point at a folder, a file or a hub id, get the model that lies there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from scfm.errors import InvalidArgumentError, MissingFileError
from scfm.models.base import FoundationModel
from scfm.models.folder import inspect_folder
from scfm.models.geneformer.checkpoint import load_geneformer
from scfm.models.hub import resolve
from scfm.models.nn.precision import resolve_device
from scfm.tokenize.dictionaries import GeneformerDictionaries

_SHIPPED = "scfm-mini"


def load(
    path: str | Path,
    family: str | None = None,
    variant: str | None = None,
    dictionaries: str | Path | GeneformerDictionaries | None = None,
    genes: str | Path | list[str] | None = None,
    version: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    revision: str | None = None,
    sha256: str | None = None,
    trust_pickle: bool = False,
) -> FoundationModel:
    """Load a model: the authors' folder, a folder saved by scfm, or a hub id ("owner/name[/subfolder]").

    A weights file with its config.json beside it works too.

    dictionaries: Geneformer's token, median, name and mapping dictionaries (folder or token-dictionary file),
    looked for beside the model when not given; version: "V1" or "V2" where no dictionary tells. dtype: of
    matrix products, "auto" being bfloat16 where the hardware multiplies it natively, "float32" for exactness.
    revision, sha256: pin a hub commit and the weights' checksum. trust_pickle: run the code that an old
    checkpoint may hold; never done otherwise. family, variant and genes matter to other families only.
    The model comes in evaluation mode; ``model.load_report`` accounts for every tensor. Raises a ScfmError
    that names the file and the key.
    """
    if str(path) == _SHIPPED and not Path(path).exists():
        raise MissingFileError(
            "this version ships no pretrained model", path=_SHIPPED, hint="Give a folder or a hub id."
        )
    for name, value in (("variant", variant), ("genes", genes)):
        if value is not None:
            raise InvalidArgumentError("is not used by Geneformer", where=name)
    if dictionaries is not None and not isinstance(dictionaries, str | Path | GeneformerDictionaries):
        raise InvalidArgumentError(
            f"is a {type(dictionaries).__name__}; expected a folder or file", where="dictionaries"
        )
    target = resolve_device(device)
    resolved = resolve(path, revision=revision, sha256=sha256)
    found = inspect_folder(resolved.folder, family=family)
    with torch.inference_mode(False):  # parameters made inside inference_mode could never be trained or cast
        model = load_geneformer(
            found.folder, found.weights, dictionaries=dictionaries, version=version, trust_pickle=trust_pickle
        )
    model.source = "/".join(filter(None, (resolved.repo_id, resolved.subfolder))) or str(found.folder)
    if model.load_report is not None:
        model.load_report = replace(model.load_report, revision=resolved.revision)
    return model.to(target).set_compute_dtype(dtype)
