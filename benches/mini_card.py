"""scfm-mini's folder in the package, from the run that trained it: weights in half precision, results, model card.

    python benches/mini_card.py RUN --data DATA [--again RUN]

RUN: what `scfm pretrain python/scfm/models/mini/pretrain.toml ...` wrote; DATA: the folder of the data sets. The model
is scored as it lies in the package, rounded weights and all (--again: a repetition, to compare bits with):

    held out     the contrast on cells of batches that were not trained on, beside chance and principal components, and
                 their hidden values beside each gene's mean (train/evaluation/held_out.py)
    never seen   labels of whole data sets, beside PCA-50 fitted on each of them, PCA-50 of the training cells, the
                 model as it began (its genes start from co-expression, so that is no zero) and random weights

Five folds: each cell is predicted once, from the cells of the other folds; nearest neighbours by cosine, and a linear
classifier. Intervals are paired bootstraps over cells. results.json has all numbers, MODEL_CARD.md the same in words.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from scipy import sparse

import scfm
from mini_card_text import card_text
from scfm.data.gene_tables import human_symbols
from scfm.data.packed import PackedCells, concatenate
from scfm.demo.cells import demo_cells
from scfm.evaluate import (
    Metric,
    Report,
    Row,
    expression_baselines,
    fit_pca,
    highly_variable_genes,
    knn_label_score,
    linear_label_score,
    paired_bootstrap,
)
from scfm.evaluate.split import keyed_generator
from scfm.models.base import FoundationModel
from scfm.models.scgpt.model import Scgpt
from scfm.models.shipped import with_own_tokenizer
from scfm.models.weights import write_safetensors
from scfm.tokenize.scgpt import ScgptTokenizer
from scfm.tokenize.scgpt_vocab import ScgptVocab
from scfm.train.config import PretrainConfig
from scfm.train.corpus.corpus import read_corpus
from scfm.train.evaluation.held_out import HeldOutEvaluation
from scfm.train.training_model import batch_labels, new_objective

PACKAGE = Path(__file__).parents[1] / "python" / "scfm" / "models" / "mini"
OURS, BEGINNING, RANDOM = "scfm-mini", "as it began", "random weights"
PCA, TRANSFERRED = "PCA-50 of this set", "PCA-50 of the training cells"
NUM_FOLDS, NUM_NEIGHBORS, SEED = 5, 15, 0
MOST_TOKENS = 30_000  # more genes than any cell expresses
VALUES_OFF = {"expression": 0.0, "mvc": 0.0}  # the contrast alone, which is then what is scored
KNN, LINEAR = Metric("kNN accuracy"), Metric("linear accuracy")


def package(run: Path, vocab: Path) -> None:
    """The run's model into the package, weights in float16."""
    made = run / "model"
    weights = {name: tensor.half() for name, tensor in load_file(made / "model.safetensors").items()}
    broken = [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())]
    if broken:
        raise SystemExit(f"{broken[0]} does not fit float16")
    write_safetensors(PACKAGE / "model.safetensors", weights, {"format": "pt"})
    shutil.copyfile(made / "config.json", PACKAGE / "config.json")
    if json.loads((made / "vocab.json").read_text()) != json.loads(vocab.read_text()):
        raise SystemExit(f"{vocab} is not the vocabulary of {made}")


def pbmc3k(data: Path) -> tuple[ad.AnnData, NDArray[np.str_]]:
    cells = ad.read_h5ad(data / "pbmc3k_labeled.h5ad")
    named = cells.obs["cell_type"].notna() & (cells.obs["cell_type"] != "unlabelled")
    return _labelled(cells[named.to_numpy()].copy())


def pancreas(data: Path) -> tuple[ad.AnnData, NDArray[np.str_]]:
    cells = ad.read_h5ad(data / "pancreas_human_mouse_baron350.h5ad")
    return _labelled(cells[(cells.obs["species"] == "human").to_numpy()].copy())


def blood700(data: Path) -> tuple[ad.AnnData, NDArray[np.str_]]:
    return _labelled(demo_cells())


NEVER_SEEN: dict[str, Callable[[Path], tuple[ad.AnnData, NDArray[np.str_]]]] = {
    "pbmc3k: blood, 10x v1, authors' labels": pbmc3k,
    "Baron 2016: human pancreas, inDrop, authors' labels": pancreas,
    "68k blood cells, 700 of them with 765 genes (the demo's)": blood700,
}


def _labelled(cells: ad.AnnData) -> tuple[ad.AnnData, NDArray[np.str_]]:
    return cells, cells.obs["cell_type"].astype(str).to_numpy()


def folds_of(labels: NDArray[np.str_]) -> NDArray[np.int64]:
    """int64 (cells,): each cell's fold; every label is spread evenly."""
    fold = np.empty(len(labels), dtype=np.int64)
    draw = keyed_generator(SEED, "folds").random(len(labels))
    for label in np.unique(labels):
        cells = np.flatnonzero(labels == label)
        fold[cells[np.argsort(draw[cells])]] = np.arange(len(cells)) % NUM_FOLDS
    return fold


def scored(embeddings: dict[str, NDArray[np.float32]], labels: NDArray[np.str_], title: str) -> Report:
    fold = folds_of(labels)
    correct = {
        name: {KNN.name: np.zeros(len(labels)), LINEAR.name: np.zeros(len(labels))} for name in embeddings
    }
    for number in range(NUM_FOLDS):
        train, test = np.flatnonzero(fold != number), np.flatnonzero(fold == number)
        for name, points in embeddings.items():
            knn = knn_label_score(points, labels, train, test, k=NUM_NEIGHBORS)
            correct[name][KNN.name][test] = knn.correct
            correct[name][LINEAR.name][test] = linear_label_score(points, labels, train, test).correct
    roles: dict[str, Any] = {OURS: "ours", PCA: "baseline", TRANSFERRED: "baseline"}
    rows = [
        Row(name, roles.get(name, "control"), {metric: float(hits.mean()) for metric, hits in found.items()})
        for name, found in correct.items()
    ]
    gains = {
        (name, metric): paired_bootstrap(correct[OURS][metric], correct[name][metric], seed=SEED)
        for name in (PCA, TRANSFERRED, BEGINNING, RANDOM)
        for metric in (KNN.name, LINEAR.name)
    }
    return Report(
        title=title,
        metrics=(KNN, LINEAR),
        rows=tuple(rows),
        split=f"{NUM_FOLDS} folds at random within each label, each cell predicted once",
        num_train=len(labels) - len(labels) // NUM_FOLDS,
        num_test=len(labels),
        seed=SEED,
        gains=gains,
        notes=(f"kNN: {NUM_NEIGHBORS} nearest by cosine; linear: logistic regression",),
    )


def run_config(run: Path, data: Path) -> PretrainConfig:
    """The run's settings, for the data as they lie here and a folder that nothing is written to."""
    found = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    config = PretrainConfig.from_mapping(found)
    return replace(config, data_folder=data, genes=PACKAGE / "vocab.json")


def pca_of(cells: ad.AnnData) -> NDArray[np.float32]:
    counts = cells.X
    sizes = cells.obs["n_counts"].to_numpy(float) if "n_counts" in cells.obs else None
    every = np.arange(cells.n_obs)
    found = expression_baselines(
        counts.indptr, counts.indices, counts.data, cells.n_vars, every, library_size=sizes
    )
    return found["PCA-50"]


class TransferredPca:
    """PCA-50 of the training cells' most variable genes, applied to cells of another set by the genes' names."""

    def __init__(self, vocab: ScgptVocab, training: PackedCells) -> None:
        self._tokenizer = ScgptTokenizer(vocab, max_tokens=None, input_style="log1p", gene_rules="all")
        self._size = vocab.size
        expression = self._matrix(training)
        self._genes = highly_variable_genes(expression)
        self._pca = fit_pca(expression[:, self._genes])

    def __call__(self, cells: ad.AnnData) -> NDArray[np.float32]:
        return self._pca.transform(self._matrix(self._tokenizer(cells))[:, self._genes])

    def _matrix(self, packed: PackedCells) -> sparse.csr_matrix:
        """log1p CP10k, (cells, tokens), without <cls>."""
        assert packed.values is not None
        values = packed.values.numpy().astype(np.float64)
        values[packed.cu_seqlens.numpy()[:-1]] = 0.0
        entries = (values, packed.token_ids.numpy(), packed.cu_seqlens.numpy())
        return sparse.csr_matrix(entries, shape=(packed.num_cells, self._size))


def training_cells(config: PretrainConfig) -> PackedCells:
    """All genes of the cells that the run trained on."""
    whole = read_corpus(replace(config, max_tokens=MOST_TOKENS))
    return concatenate(list(whole.packs_of(np.flatnonzero(~whole.held_out))))


def genes_table(vocab: ScgptVocab, cells: PackedCells) -> str:
    """Of every gene its symbol, Ensembl ids (GENCODE v44) and median CP10k over the training cells that express it."""
    assert cells.values is not None
    tokens, values = cells.token_ids.numpy(), np.expm1(cells.values.numpy())
    order = np.lexsort((values, tokens))
    tokens, values = tokens[order], values[order]
    ids = human_symbols()
    rows = ["symbol\tensembl_id\tmedian_cp10k"]
    for gene, token in vocab.token.items():
        start, stop = np.searchsorted(tokens, [token, token + 1])
        median = f"{np.median(values[start:stop]):.4f}" if stop > start else ""
        if not gene.startswith("<"):
            rows.append(f"{gene}\t{','.join(ids.get(gene, ()))}\t{median}")
    return "\n".join(rows) + "\n"


def results(run: Path, data: Path) -> dict[str, Any]:
    ours = scfm.load(str(PACKAGE), dtype="float32")
    assert isinstance(ours, Scgpt) and ours.vocab is not None
    with_own_tokenizer(ours)
    with tempfile.TemporaryDirectory() as scratch:
        config = replace(run_config(run, data), out=scratch)
        corpus = read_corpus(config)
        objective = new_objective(config, corpus, torch.device("cpu"))
        corpus.measure(objective.lengths_of)
        beginning = objective.model.eval()
        held_out = [
            HeldOutEvaluation(part, corpus, batch_labels=batch_labels(part, corpus))(ours).reports[0]
            for part in (replace(config, objective=config.objective | VALUES_OFF), config)
        ]
        transferred = TransferredPca(ours.vocab, training_cells(config))
        trained = {"num_training": corpus.num_training, "num_held_out": corpus.num_held_out}
    untrained = Scgpt.from_config(ours.config, ours.vocab, seed=SEED)
    models: dict[str, FoundationModel] = {OURS: ours, BEGINNING: beginning, RANDOM: untrained}
    reports = []
    for title, read in NEVER_SEEN.items():
        cells, labels = read(data)
        embeddings = {name: with_own_tokenizer(model).embed(cells) for name, model in models.items()}
        baselines = {PCA: pca_of(cells), TRANSFERRED: transferred(cells)}
        reports.append(scored({OURS: embeddings.pop(OURS), **baselines, **embeddings}, labels, title))
        print(reports[-1].to_text(), flush=True)
    return {
        "model": {
            "num_parameters": ours.num_parameters(),
            "num_genes": len(ours.vocab.genes),
            "bytes": sum(file.stat().st_size for file in PACKAGE.iterdir() if file.suffix != ".md"),
            "config": ours.config.to_dict(),
        },
        "run": {**trained, **run_facts(run)},
        "held_out": [report.to_dict() for report in held_out],
        "never_seen": [report.to_dict() for report in reports],
    }


def run_facts(run: Path) -> dict[str, Any]:
    """Steps, cells and wall time of the run, from its log."""
    text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    steps = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
    return {
        "steps": steps[-1]["step"],
        "epochs": steps[-1]["epoch"] + 1,
        "cells_seen": sum(line["cells"] for line in steps),
        "tokens_seen": sum(line["tokens"] for line in steps),
        "step_minutes": round(sum(line["step_s"] for line in steps) / 60, 1),
        "loss_first": float(np.mean([line["loss_cce"] for line in steps[:20]])),
        "loss_last": float(np.mean([line["loss_cce"] for line in steps[-20:]])),
        "torch": str(torch.__version__),
        "machine": processor(),
    }


def compared(run: Path, again: Path) -> dict[str, Any]:
    """Whether a repetition ended with the same bits, and at which steps it was resumed."""
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in (run, again))
    text = (again / "metrics.jsonl").read_text(encoding="utf-8")
    events = [line for line in map(json.loads, text.splitlines()) if line.get("event") == "resumed"]
    return {
        "same_bits": all(torch.equal(first[name], second[name]) for name in first),
        "resumed_at": [line["step"] for line in events],
    }


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, one core of {len(named)}, shared with other work"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--again", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    package(given.run, PACKAGE / "vocab.json")
    vocab = ScgptVocab.from_file(PACKAGE / "vocab.json")
    genes = genes_table(vocab, training_cells(run_config(given.run, given.data)))
    (PACKAGE / "genes.tsv").write_text(genes, encoding="utf-8")
    found = results(given.run, given.data)
    if given.again is not None:
        found["run"]["again"] = compared(given.run, given.again)
    (PACKAGE / "results.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    tried = json.loads((Path(__file__).parent / "results" / "mini_tried.json").read_text(encoding="utf-8"))
    (PACKAGE / "MODEL_CARD.md").write_text(card_text(found, tried), encoding="utf-8")


if __name__ == "__main__":
    main()
