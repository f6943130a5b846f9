"""``scfm.tl.generate``: expression of genes that were not measured, from those that were or from a cell's embedding.

A prompt is a cell's known genes, a cell embedding in place of <cls>, or both. How values come out of it, iteration by
iteration, is in confidence_order.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from scfm.data.packed import PackedCells, concatenate
from scfm.embed.provenance import provenance
from scfm.errors import BadCellError, GeneMappingError, InvalidArgumentError, ScfmWarning
from scfm.models.base import FoundationModel
from scfm.models.engine import Progress, default_token_budget
from scfm.models.scgpt.model import Scgpt
from scfm.tasks.confidence_order import Confidence, GeneratedValues, generate_values, resolve_confidence
from scfm.tokenize.scgpt_vocab import ScgptVocab

if TYPE_CHECKING:
    from anndata import AnnData

__all__ = ["generate"]

_SHOWN = 5
KEY = "generate"


def generate(
    model: FoundationModel,
    known: Any = None,
    *,
    genes: Sequence[str],
    cell_embedding: ArrayLike | Tensor | None = None,
    num_iterations: int = 1,
    confidence: Confidence = "auto",
    batch_labels: ArrayLike | None = None,
    counts_layer: str | None = None,
    species: str | None = None,
    token_budget: int | None = None,
    progress: Progress | None = None,
) -> AnnData:
    """Generate the expression of ``genes`` for every cell of ``known``.

    model: a scGPT of generative pretraining, such as the released whole-human one. known: cells whose expressed genes
    are known (whatever scfm.read accepts, or PackedCells with <cls> first), or {gene: value} for one cell, values in
    the model's units (bins); asked genes that such cells express are hidden from the model, so that what comes out can
    be compared with them. None: nothing is known but ``cell_embedding``. genes: symbols of the model's vocabulary.
    cell_embedding: (hidden_size,) or (cells, hidden_size), which enters in place of <cls>, as pretraining's second pass
    had it: ``model.forward(...).cell_embeddings``, not made one long. num_iterations: K; more than there are genes is
    as many as there are. confidence: what makes a prediction certain enough to become known: "zeros", "bounded",
    "agreement" or "none", by default the first of these that the model has; see scfm.tasks.confidence_order.
    batch_labels: (cells,), for models that have them. counts_layer, species: of ``known``.

    Returns an AnnData, cells x genes: float32 ``X``, the predictions (in bins, for models of bins); layers "values"
    (what later iterations were given: whole bins from 0 up), "confidence", "iteration" (1 to K) and, where the model
    has explicit zeros, "expressed" (probability of being expressed); settings in ``uns["scfm"]["generate"]``. A cell's
    row depends on the cell alone. Raises GeneMappingError naming genes that the vocabulary lacks,
    BadCellError naming cells that have neither a known gene nor an embedding, InvalidArgumentError. Source: Cui et al.
    2024.
    """
    scgpt, vocab = _generator(model)
    asked = _asked_genes(genes, vocab)
    if isinstance(num_iterations, bool) or not isinstance(num_iterations, int) or num_iterations < 1:
        raise InvalidArgumentError(f"{num_iterations!r}; expected 1 or more", where="num_iterations")
    kind = resolve_confidence(scgpt.config, confidence)
    embeddings = _cell_embeddings(cell_embedding, scgpt)
    prompts, obs = _prompts(scgpt, vocab, known, embeddings, counts_layer=counts_layer, species=species)
    if isinstance(known, Mapping):
        _expect_not_asked(known, genes)
    prompts = _without(prompts, asked)
    if embeddings is None:
        _expect_something_known(prompts)
    found = generate_values(
        scgpt,
        prompts,
        asked,
        num_iterations=num_iterations,
        confidence=kind,
        cell_embeddings=_one_each(embeddings, prompts.num_cells),
        batch_labels=_batch_labels(batch_labels, prompts.num_cells),
        token_budget=token_budget or default_token_budget(scgpt.device),
        progress=progress,
    )
    facts = provenance(scgpt, layer=0, pooling="cls", source=type(known).__name__, tokenization={})
    facts |= {"num_iterations": num_iterations, "confidence": kind, "cell_embedding": embeddings is not None}
    return _table(found, obs, list(genes), facts)


def _generator(model: FoundationModel) -> tuple[Scgpt, ScgptVocab]:
    if not isinstance(model, Scgpt):
        raise InvalidArgumentError(f"{model.family} cannot generate genes; expected a scGPT", where="model")
    if not model.config.has_flags:
        raise InvalidArgumentError(
            "has no flag_encoder: it was never trained to generate genes",
            where="model",
            hint="Use a checkpoint of generative pretraining, such as the released whole-human one.",
        )
    if model.vocab is None:
        raise InvalidArgumentError("was loaded without vocab.json, so genes have no tokens", where="model")
    return model, model.vocab


def _tokens_of(names: Sequence[str], vocab: ScgptVocab, where: str) -> NDArray[np.int32]:
    """Raises GeneMappingError that names what the vocabulary lacks, special tokens being no genes."""
    known = set(vocab.genes)
    missing = [name for name in names if name not in known]
    if missing:
        like = get_close_matches(str(missing[0]), known, 1)
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise GeneMappingError(
            f"the model's vocabulary lacks {', '.join(map(repr, missing[:_SHOWN]))}{more}",
            where=where,
            hint=f"Did you mean {like[0]!r}?" if like else "Genes are symbols, as in model.vocab.genes.",
        )
    return np.fromiter((vocab.token[name] for name in names), dtype=np.int32, count=len(names))


def _asked_genes(genes: Sequence[str], vocab: ScgptVocab) -> NDArray[np.int32]:
    if isinstance(genes, str) or not len(genes):
        raise InvalidArgumentError(f"{genes!r}; expected a list of genes", where="genes")
    asked = _tokens_of(genes, vocab, "genes")
    twice = [
        name
        for name, count in zip(*np.unique(np.asarray(genes), return_counts=True), strict=True)
        if count > 1
    ]
    if twice:
        raise InvalidArgumentError(f"{str(twice[0])!r} is asked for more than once", where="genes")
    return asked


def _expect_not_asked(known: Mapping[str, float], genes: Sequence[str]) -> None:
    both = [name for name in genes if name in known]
    if both:
        raise InvalidArgumentError(
            f"{both[0]!r} is given and asked for ({len(both)} such genes)", where="known"
        )


def _cell_embeddings(given: ArrayLike | Tensor | None, model: Scgpt) -> Tensor | None:
    """float32 (cells or 1, hidden_size)."""
    if given is None:
        return None
    array = given.detach().cpu() if isinstance(given, Tensor) else torch.as_tensor(np.asarray(given))
    rows: Tensor = array.float().unsqueeze(0) if array.dim() == 1 else array.float()
    if rows.dim() != 2 or rows.shape[1] != model.config.hidden_size or not bool(rows.isfinite().all()):
        raise InvalidArgumentError(
            f"{tuple(array.shape)}; expected finite rows of {model.config.hidden_size}",
            where="cell_embedding",
        )
    num_unit = int((rows.norm(dim=1) - 1).abs().lt(1e-3).sum())
    if num_unit == len(rows) and len(rows):
        warnings.warn(
            f"{num_unit} cell embeddings are one long, as model.embed gives them; the model was trained with "
            "model.forward(...).cell_embeddings, which are not",
            ScfmWarning,
            stacklevel=3,
        )
    return rows


def _one_each(embeddings: Tensor | None, num_cells: int) -> Tensor | None:
    if embeddings is None or len(embeddings) == num_cells:
        return embeddings
    if len(embeddings) == 1:
        return embeddings.expand(num_cells, -1)
    raise InvalidArgumentError(f"{len(embeddings)} for {num_cells} cells", where="cell_embedding")


def _batch_labels(given: ArrayLike | None, num_cells: int) -> NDArray[np.int64] | None:
    if given is None:
        return None
    labels = np.asarray(given)
    if labels.shape != (num_cells,) or labels.dtype.kind not in "iu":
        raise InvalidArgumentError(
            f"{labels.dtype} {labels.shape}; expected whole numbers ({num_cells},)", where="batch_labels"
        )
    return labels.astype(np.int64)


def _prompts(
    model: Scgpt,
    vocab: ScgptVocab,
    known: Any,
    embeddings: Tensor | None,
    *,
    counts_layer: str | None,
    species: str | None,
) -> tuple[PackedCells, pd.DataFrame]:
    """<cls> and the known genes of each cell, and what is known about the cells beside."""
    if known is None and embeddings is None:
        raise InvalidArgumentError(
            "neither known genes nor a cell embedding: there is nothing to generate from", where="known"
        )
    if known is None or isinstance(known, Mapping):
        given = {} if known is None else known
        tokens = [vocab.cls_id, *_tokens_of(list(given), vocab, "known").tolist()]
        values = [model.config.pad_value, *(float(value) for value in given.values())]
        num_cells = 1 if embeddings is None else len(embeddings)
        packed = PackedCells.from_lists([tokens] * num_cells, [values] * num_cells)
        return packed, pd.DataFrame(index=[str(cell) for cell in range(num_cells)])
    if isinstance(known, PackedCells):
        packed = known
        first = packed.token_ids[packed.cu_seqlens[:-1].long()] if bool((packed.lengths > 0).all()) else None
        if first is None or bool((first != vocab.cls_id).any()):
            raise InvalidArgumentError("some cell does not begin with <cls>", where="known")
        if packed.values is None:
            raise InvalidArgumentError("has no values", where="known")
        return packed, pd.DataFrame(index=[str(cell) for cell in packed.cell_ids.tolist()])
    source = model.tokenizer.read(known, layer=counts_layer)
    stream = model.tokenizer.packs(source, species=species, use_filter_pass=False)
    return _every_cell(concatenate(list(stream)), len(source), model), source.obs.copy()


def _every_cell(packed: PackedCells, num_cells: int, model: Scgpt) -> PackedCells:
    """Tokenizers leave out cells without genes; here such a cell is <cls> alone."""
    packed = packed.select(packed.lengths > 0)
    given, lengths = packed.cell_ids.numpy(), np.ones(num_cells, dtype=np.int64)
    lengths[given] = packed.lengths.numpy()
    ends = np.concatenate([[0], np.cumsum(lengths)])
    shifts = ends[:-1][given] - packed.cu_seqlens.numpy()[:-1]
    rows = np.arange(packed.num_tokens) + np.repeat(shifts, packed.lengths.numpy())
    assert model.vocab is not None and packed.values is not None
    tokens = np.full(ends[-1], model.vocab.cls_id, dtype=np.int32)
    values = np.full(ends[-1], model.config.pad_value, dtype=np.float32)
    tokens[rows], values[rows] = packed.token_ids.numpy(), packed.values.numpy()
    return PackedCells(
        torch.from_numpy(tokens),
        torch.from_numpy(values),
        torch.from_numpy(ends.astype(np.int32)),
        torch.arange(num_cells, dtype=torch.int64),
    )


def _expect_something_known(prompts: PackedCells) -> None:
    bare = (prompts.lengths <= 1).nonzero().flatten()
    if len(bare):
        cells = ", ".join(str(cell) for cell in prompts.cell_ids[bare[:_SHOWN]].tolist())
        raise BadCellError(
            f"{len(bare)} cells have no known gene beside the asked ones, rows {cells}"
            f"{' ...' if len(bare) > _SHOWN else ''}: there is nothing to generate from",
            where="known",
            hint="Leave these cells out, ask for fewer genes, or give cell_embedding.",
        )


def _without(prompts: PackedCells, genes: NDArray[np.int32]) -> PackedCells:
    """The prompts without the asked genes."""
    kept = torch.from_numpy(~np.isin(prompts.token_ids.numpy(), genes))
    if bool(kept.all()):
        return prompts
    before = torch.nn.functional.pad(kept.to(torch.int32).cumsum(0), (1, 0)).to(torch.int32)
    assert prompts.values is not None
    return PackedCells(
        prompts.token_ids[kept], prompts.values[kept], before[prompts.cu_seqlens.long()], prompts.cell_ids
    )


def _table(found: GeneratedValues, obs: pd.DataFrame, genes: list[str], facts: dict[str, Any]) -> AnnData:
    from anndata import AnnData

    obs.index = obs.index.astype(str)
    adata = AnnData(found.predictions, obs=obs, var=pd.DataFrame(index=genes))
    adata.layers["values"] = found.values
    adata.layers["confidence"] = found.confidence
    adata.layers["iteration"] = found.iterations
    if found.expressed is not None:
        adata.layers["expressed"] = found.expressed
    adata.uns["scfm"] = {KEY: facts}
    return adata
