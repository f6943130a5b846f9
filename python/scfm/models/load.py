"""``scfm.load``: point at a folder, a file or a hub id, get the model that lies there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scfm.errors import InvalidArgumentError
from scfm.models.base import FoundationModel
from scfm.models.folder import FolderKind, inspect_folder
from scfm.models.geneformer.checkpoint import load_geneformer
from scfm.models.hub import resolve
from scfm.models.nn.precision import resolve_device
from scfm.models.scbert.checkpoint import load_scbert
from scfm.models.scfoundation.checkpoint import load_scfoundation
from scfm.models.scgpt.checkpoint import load_scgpt
from scfm.models.shipped import SHIPPED, is_shipped, shipped_folder, with_own_tokenizer
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.scgpt_vocab import ScgptVocab


def load(
    path: str | Path,
    family: str | None = None,
    variant: str | None = None,
    dictionaries: str | Path | GeneformerDictionaries | None = None,
    genes: str | Path | list[str] | ScgptVocab | None = None,
    version: str | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    revision: str | None = None,
    sha256: str | None = None,
    trust_pickle: bool = False,
    options: Mapping[str, Any] | None = None,
) -> FoundationModel:
    """Load a model: the authors' folder, a folder saved by scfm, a hub id ("owner/name[/subfolder]"), or "scfm-mini".

    "scfm-mini" is the small scGPT that lies in the package, unless a file or folder here bears that name. A weights
    file with its config.json beside it works too, and with ``family=`` one without.

    dictionaries: Geneformer's token, median, name and mapping dictionaries (folder or token-dictionary file),
    looked for beside the model when not given; version: "V1" or "V2" where no dictionary tells. dtype: of
    matrix products, "auto" being bfloat16 where the hardware multiplies it natively, "float32" for exactness.
    revision, sha256: pin a hub commit and the weights' checksum. trust_pickle: run the code that an old
    checkpoint may hold; never done otherwise. family: only where the folder does not tell it.
    genes: scGPT's vocab.json, or the genes of scBERT and scFoundation in order (file or symbols), where they do not
    lie beside the weights. variant: scFoundation's "cell" (the default), "rde" or "gene".
    options: keyword arguments that the original's constructor was given, of what scGPT's args.json and weights do not
    tell, such as {"cell_emb_style": "avg-pool"}; they may also lie in model_kwargs.json beside the weights. For scBERT
    such as {"generalized_attention": True}, and "class_names" of a fine-tuned head.
    The model comes in evaluation mode; ``model.load_report`` accounts for every tensor. Raises a ScfmError
    that names the file and the key.
    """
    shipped = is_shipped(path)
    if shipped:
        path = shipped_folder()
    target = resolve_device(device)
    resolved = resolve(path, revision=revision, sha256=sha256)
    found = inspect_folder(resolved.folder, family=family)
    with torch.inference_mode(False):  # parameters made inside inference_mode could never be trained or cast
        if found.family == "scgpt":
            _refuse(found, variant=variant, dictionaries=dictionaries, version=version)
            if isinstance(genes, list):
                raise InvalidArgumentError("scGPT needs vocab.json, which numbers the genes", where="genes")
            model: FoundationModel = load_scgpt(
                found, options=options, vocab=genes, trust_pickle=trust_pickle
            )
        elif found.family == "scbert":
            _refuse(found, variant=variant, dictionaries=dictionaries, version=version)
            if isinstance(genes, ScgptVocab):
                raise InvalidArgumentError("is scGPT's vocabulary; scBERT needs a gene order", where="genes")
            model = load_scbert(found, genes=genes, options=options, trust_pickle=trust_pickle)
        elif found.family == "scfoundation":
            _refuse(found, dictionaries=dictionaries, version=version, options=options)
            if isinstance(genes, ScgptVocab):
                raise InvalidArgumentError(
                    "is scGPT's vocabulary; scFoundation needs its genes", where="genes"
                )
            model = load_scfoundation(found, variant=variant, genes=genes, trust_pickle=trust_pickle)
        else:
            _refuse(found, variant=variant, genes=genes, options=options)
            model = _load_geneformer(found, dictionaries, version, trust_pickle)
    model.source = "/".join(filter(None, (resolved.repo_id, resolved.subfolder))) or str(found.folder)
    if shipped:
        model.source = SHIPPED
        model = with_own_tokenizer(model) if genes is None else model
    if model.load_report is not None:
        model.load_report = replace(model.load_report, revision=resolved.revision)
    return model.to(target).set_compute_dtype(dtype)


def _load_geneformer(
    found: FolderKind, dictionaries: Any, version: str | None, trust_pickle: bool
) -> FoundationModel:
    if dictionaries is not None and not isinstance(dictionaries, str | Path | GeneformerDictionaries):
        raise InvalidArgumentError(
            f"is a {type(dictionaries).__name__}; expected a folder or file", where="dictionaries"
        )
    return load_geneformer(
        found.folder, found.weights, dictionaries=dictionaries, version=version, trust_pickle=trust_pickle
    )


def _refuse(found: FolderKind, **arguments: object) -> None:
    """Arguments that the family has no use for would be mistakes."""
    for name, value in arguments.items():
        if value is not None:
            raise InvalidArgumentError(f"is not used by {found.family}", where=name, path=found.folder)
