"""An epoch before it is trained: how many cells, tokens and microbatches, and some cells that stand for all of them.

From the data every cell's length is known after one pass, and the cells that stand for the others are evenly spaced
quantiles of length, so that what depends on the square of it comes out right with a few hundred. Without data the cells
are made up: as many tokens in the mean as one says, spread as in tissue atlases (log-normal, sigma 0.5), of the
vocabulary that the settings name or of one as large as the released model's. Either way the run's own tokenizer and
objective prepare them. The model has its shape and no weights.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from numpy.typing import NDArray

from scfm.data.packed import PackedCells, concatenate
from scfm.data.read import read
from scfm.errors import ConfigError
from scfm.models.base import FoundationModel
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.tokenize.scbert_panel import ScbertPanel
from scfm.tokenize.scfoundation_genes import ScfoundationGenes
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.train.config import PretrainConfig
from scfm.train.corpus.budget_advice import better_budget, unused_share
from scfm.train.corpus.corpus import read_corpus
from scfm.train.corpus.microbatch_plan import expect_cells_fit
from scfm.train.corpus.vocabulary import Vocabulary, given_vocabulary, tokenizer_of
from scfm.train.objectives.prepared import Prepared
from scfm.train.objectives.protocol import PretrainingObjective, make_objective, new_model
from scfm.train.objectives.settings import objective_settings
from scfm.train.training_model import batch_labels

__all__ = ["PlannedEpoch", "guessed_epoch", "planned_epoch"]

# Genes of the released models, where neither data nor a file says which there are.
_GENES_OF = {"geneformer": 20_271, "scgpt": 60_694, "scbert": 16_906, "scfoundation": 19_264}
_SPREAD = 0.5
_SAMPLE = 256
_REPEATS = 16  # of the sample, as many cells as a window of the plan packs


@dataclass(frozen=True)
class PlannedEpoch:
    """num_cells, num_tokens (positions that are computed): of the training cells. sample: microbatches of cells that
    stand for them, sample_cells of them. unused_share: of the token budget. better_budget: one that the cells fill
    better, where that is worth a word. guessed: nothing was read.
    """

    objective: PretrainingObjective
    sample: list[Prepared]
    sample_cells: int
    num_cells: int
    num_tokens: int
    num_microbatches: int
    unused_share: float
    better_budget: int | None = None
    guessed: bool = False

    @property
    def model(self) -> FoundationModel:
        model: FoundationModel = self.objective.model
        return model


def planned_epoch(config: PretrainConfig) -> PlannedEpoch:
    """Of the data: each cell is tokenized once; its length is kept in ``config.out``, where the run looks for it.

    Raises as the run would for settings and data that cannot be.
    """
    objective_settings(config.family, config.objective)
    corpus = read_corpus(config)
    objective = _objective(config, corpus.tokenizer.vocab, batch_labels(config, corpus))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="token_budget = ")  # said as ``better_budget``
        corpus.measure(objective.lengths_of)
    plan = corpus.plan(0)
    training = np.flatnonzero(corpus.lengths > 0)
    by_length = training[np.argsort(corpus.lengths[training], kind="stable")]
    chosen = by_length[_quantiles(len(by_length))]
    packs = list(corpus.packs_of(chosen))
    advice = better_budget(corpus.lengths[training], config.token_budget)
    return PlannedEpoch(
        objective,
        list(_prepared(objective, packs, config.token_budget)),
        sample_cells=len(chosen),
        num_cells=corpus.num_training,
        num_tokens=corpus.num_tokens,
        num_microbatches=plan.num_microbatches,
        unused_share=plan.unused_share,
        better_budget=None if advice is None else advice[1],
    )


def guessed_epoch(config: PretrainConfig, num_cells: int, tokens_per_cell: float) -> PlannedEpoch:
    """Of so many training cells that express so many genes in the mean. Raises ConfigError."""
    if num_cells < 1 or not 1 <= tokens_per_cell <= 1_000_000:
        raise ConfigError(f"{num_cells:,} cells of {tokens_per_cell:,} tokens", where="--cells")
    objective_settings(config.family, config.objective)
    vocab = given_vocabulary(config) or _made_up(config.family)
    labels = np.zeros(_SAMPLE, dtype=np.int64) if config.objective.get("batch") else None
    objective = _objective(config, vocab, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # made-up cells are odd cells
        packs = list(
            tokenizer_of(config, vocab, is_made=False).packs(read(_made_up_cells(vocab, tokens_per_cell)))
        )
    lengths = torch.cat([objective.lengths_of(pack) for pack in packs]).numpy()
    expect_cells_fit(lengths.astype(np.uint32), config.token_budget, lambda cell: "made up")
    num_tokens = round(float(lengths.mean()) * num_cells)
    unused = unused_share(np.tile(lengths, _REPEATS).astype(np.uint32), config.token_budget)
    return PlannedEpoch(
        objective,
        list(_prepared(objective, packs, config.token_budget)),
        sample_cells=len(lengths),
        num_cells=num_cells,
        num_tokens=num_tokens,
        num_microbatches=max(math.ceil(num_tokens / (config.token_budget * (1 - unused))), 1),
        unused_share=unused,
        guessed=True,
    )


def _objective(
    config: PretrainConfig, vocab: Vocabulary, labels: NDArray[np.int64] | None
) -> PretrainingObjective:
    """Of a model of the run's shape on torch's meta device, where weights take no memory and no time."""

    def coexpression(num_components: int) -> NDArray[np.float32]:
        assert isinstance(vocab, GeneformerDictionaries)
        return np.zeros((max(vocab.token.values()) + 1, num_components), dtype=np.float32)

    corpus: Any = SimpleNamespace(tokenizer=SimpleNamespace(vocab=vocab), coexpression=coexpression)
    num_labels = 0 if labels is None else int(labels.max()) + 1
    with torch.device("meta"):
        model = new_model(config, corpus, num_batch_labels=num_labels)
    return make_objective(config, model, batch_labels=labels)


def _prepared(
    objective: PretrainingObjective, packs: Sequence[PackedCells], token_budget: int
) -> Iterator[Prepared]:
    """Cells in the order given, as many in a microbatch as the budget takes."""
    cells = concatenate(packs)
    ends = np.cumsum(objective.lengths_of(cells).numpy())
    start = 0
    while start < cells.num_cells:
        before = ends[start - 1] if start else 0
        stop = max(int(np.searchsorted(ends, before + token_budget, side="right")), start + 1)
        yield objective.prepare(cells.select(slice(start, stop)), epoch=0)
        start = stop


def _quantiles(count: int) -> NDArray[np.int64]:
    """Of ``count`` things in order, at most _SAMPLE that are evenly spaced."""
    size = min(count, _SAMPLE)
    places: NDArray[np.int64] = ((np.arange(size) + 0.5) * count / size).astype(np.int64)
    return places


def _made_up(family: str) -> Vocabulary:
    if family == "geneformer":
        ids = [f"ENSG{number:011d}" for number in range(_GENES_OF[family])]
        return GeneformerDictionaries.from_vocabulary(ids, dict.fromkeys(ids, 1.0), version="V2")
    genes = [f"GENE{number}" for number in range(_GENES_OF[family])]
    if family == "scgpt":
        names = [*genes, "<pad>", "<cls>", "<eoc>"]
        return ScgptVocab.from_dict({name: number for number, name in enumerate(names)})
    return ScbertPanel(genes) if family == "scbert" else ScfoundationGenes.of(genes)


def _made_up_cells(vocab: Vocabulary, tokens_per_cell: float) -> ad.AnnData:
    """Cells that express the first so many genes, one count each in turn of 1 to 3."""
    genes = list(vocab.genes)
    quantiles = (np.arange(_SAMPLE) + 0.5) / _SAMPLE
    normal = np.sort(np.random.default_rng(0).standard_normal(1 << 16))
    lengths = np.exp(_SPREAD * normal[(quantiles * normal.size).astype(int)])
    lengths = np.clip(np.rint(lengths * (tokens_per_cell / lengths.mean())), 1, len(genes)).astype(np.int64)
    # Shuffled, so that a microbatch has cells of all lengths.
    lengths = np.random.default_rng(1).permutation(lengths)
    columns = np.concatenate([np.arange(length) for length in lengths])
    counts = (columns % 3 + 1).astype(np.float32)
    pointers = np.concatenate([[0], np.cumsum(lengths)])
    matrix = sp.csr_matrix((counts, columns, pointers), shape=(_SAMPLE, len(genes)))
    return ad.AnnData(matrix, var=pd.DataFrame(index=genes))
