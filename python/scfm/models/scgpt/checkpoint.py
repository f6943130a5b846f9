"""scGPT to and from disk: the authors' folders (args.json, vocab.json, best_model.pt), and scfm's own.

scfm's folder is config.json (with an "scfm" section), model.safetensors under the authors' tensor names in torch's
layout, and vocab.json. Every tensor of a file is loaded, or named in the report with the reason why not; nothing is
ever left random. Source: the released whole-human folder, its successors' key layouts, and scGPT-spatial's weights.
"""

from __future__ import annotations

import glob
import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scfm.data.atomic_file import whole_folder
from scfm.data.safe_pickle import load_json
from scfm.errors import CheckpointError, ConfigError, InvalidArgumentError, ScfmWarning
from scfm.models.folder import FORMAT_VERSION, FolderKind
from scfm.models.load_report import fit_state
from scfm.models.scgpt.config import ScgptConfig
from scfm.models.scgpt.model import Scgpt
from scfm.models.scgpt.names import IGNORED, our_name, plain_name, their_name, unknown_modules
from scfm.models.scgpt.original import ARGS, KWARGS, Source, config_of
from scfm.models.weights import Weights, read_weights, write_safetensors
from scfm.tokenize.scgpt_vocab import ScgptVocab

KWARGS_FILE = "model_kwargs.json"
_MAX_ARGS_BYTES = 4 << 20
_NOT_SCGPT = "part of no released scGPT module: its outputs are not computed here"


def load_scgpt(
    found: FolderKind,
    *,
    options: Mapping[str, Any] | None = None,
    vocab: str | Path | ScgptVocab | None = None,
    trust_pickle: bool = False,
) -> Scgpt:
    """The model in the folder, float32 on the CPU, in evaluation mode, with ``load_report``.

    options: keyword arguments of the original's constructor (see original.py), for what neither args.json nor the
    weights tell. vocab: vocab.json where it does not lie beside the weights.
    Raises MissingFileError, ConfigError, CheckpointError, FormatError or UnsafeCheckpointError.
    """
    weights = read_weights(found.weights, trust_pickle=trust_pickle)
    if found.layout == "scfm":
        if options:
            raise InvalidArgumentError(
                "a folder saved by scfm says everything itself", where="options", path=found.folder
            )
        config, absent = _own_config(found), dict[str, str]()
    else:
        config, absent = _authors_config(found, weights, options)
    vocabulary = _vocabulary(found.folder, vocab, config, weights.source_file)
    with torch.device("meta"):
        model = Scgpt(config, vocabulary)
    expected = {their_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    state, report = fit_state(
        expected, weights, rename=plain_name, ignore=_ignored(weights), family=Scgpt.family
    )
    # Copies: tensors mapped from a file would follow whatever becomes of it.
    ours = {our_name(name): tensor.to(torch.float32, copy=True) for name, tensor in state.items()}
    model.load_state_dict(ours, strict=True, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    model.load_report = replace(report, missing={**report.missing, **absent})
    return model.eval()


def save_scgpt(model: Scgpt, folder: Path) -> Path:
    """Write scfm's folder; it appears whole under its name, or not at all."""
    with whole_folder(folder) as partial:
        state = {their_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
        write_safetensors(partial / "model.safetensors", state, {"format": "pt"})
        if model.vocab is not None:
            vocabulary = json.dumps(model.vocab.token, ensure_ascii=False, indent=0)
            (partial / "vocab.json").write_text(vocabulary + "\n", encoding="utf-8")
        section = {
            "format_version": FORMAT_VERSION,
            "family": model.family,
            "config": model.config.to_dict(),
        }
        config = json.dumps({"model_type": "scgpt", "scfm": section}, indent=2)
        (partial / "config.json").write_text(config + "\n", encoding="utf-8")
    return folder


def _own_config(found: FolderKind) -> ScgptConfig:
    path = found.folder / "config.json"
    section = found.config["scfm"].get("config")
    if not isinstance(section, dict):
        raise ConfigError("expected an object", path=path, where="scfm.config")
    return ScgptConfig.from_dict(section, path)


def _authors_config(
    found: FolderKind, weights: Weights, options: Mapping[str, Any] | None
) -> tuple[ScgptConfig, dict[str, str]]:
    args_path, kwargs_path = found.folder / "args.json", found.folder / KWARGS_FILE
    args = Source("args.json", found.config, ARGS, args_path) if args_path.is_file() else None
    kwargs = [] if options is None else [Source("options", options, KWARGS)]
    if kwargs_path.is_file():
        content = load_json(kwargs_path, max_bytes=_MAX_ARGS_BYTES)
        kwargs.append(Source(KWARGS_FILE, content, KWARGS, kwargs_path))
    shapes = {plain_name(name): shape for name, shape in weights.shapes.items()}
    return config_of(shapes, weights.source_file, args=args, kwargs=kwargs)


def _vocabulary(
    folder: Path, given: str | Path | ScgptVocab | None, config: ScgptConfig, weights_path: Path
) -> ScgptVocab | None:
    if isinstance(given, ScgptVocab):
        vocab = given
    else:
        path = folder / "vocab.json" if given is None else Path(given)
        if given is None and not path.is_file():
            return None
        vocab = ScgptVocab.from_file(path)
    if vocab.size != config.vocab_size:
        appended = f" ({', '.join(vocab.appended)} appended)" if vocab.appended else ""
        raise CheckpointError(
            f"{vocab.size:,} tokens{appended}; the gene table of {weights_path.name} has {config.vocab_size:,} rows",
            path=vocab.source or None,
            where="vocabulary",
            hint="Give the vocab.json that came with these weights.",
        )
    if config.pad_token not in vocab.token:
        raise ConfigError(
            f"{config.pad_token!r} is not in the vocabulary", path=vocab.source or None, where="pad_token"
        )
    return vocab


def _ignored(weights: Weights) -> dict[str, str]:
    """Names that are left out, as patterns -> why; warns of modules that no released scGPT has."""
    plain = {name: plain_name(name) for name in weights}
    strangers = unknown_modules(plain.values())
    if strangers:
        warnings.warn(
            f"{weights.source_file}: tensors of {', '.join(strangers[:5])}: {_NOT_SCGPT} (model.load_report has all)",
            ScfmWarning,
            stacklevel=4,
        )
    unknown = {glob.escape(name): _NOT_SCGPT for name in plain if plain[name].partition(".")[0] in strangers}
    return {**IGNORED, **unknown}
