"""scBERT's fine-tuning from random weights on labelled cells, within a time limit, beside majority and regression.

    python benches/train_scbert_head.py DATA/pbmc3k_labeled.h5ad --minutes 20 [--resume FILE]

The authors' finetune.py: an 80/20 split within each label, Adam at their learning rates, 180 cells a step (batches of
3, 60 of them accumulated), early stopping after 10 epochs without a better accuracy, the last norm, the block before
the last and the head trained. What lies before the first trained block never changes, so it is computed once a cell and
kept in bfloat16; projections are not redrawn. The panel is the genes whose logarithmic expression varies most in the
training cells, since random weights have no panel of their own. Each epoch takes every training cell once (the original
draws cells with replacement) and is scored on all test cells. --trained head keeps the last block's output too: an
epoch then takes seconds.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

import scfm
from scfm.evaluate import log1p_cp10k, macro_f1, stratified_split
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.tokenize.scbert_panel import ScbertPanel
from scfm.train.objectives.scbert import annotation_losses, class_numbers, freeze
from scfm.train.objectives.scbert_schedule import learning_rate

CELLS_A_STEP, CELLS_AT_ONCE, PATIENCE, SPLIT_SEED = 180, 30, 10, 2021


@dataclass
class Cells:
    """Labelled cells: log1p CP10k of the panel's genes (for the regression), classes, train and test positions."""

    data: ad.AnnData
    log_expression: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray


def read_cells(path: Path, label_key: str, left_out: list[str], num_genes: int) -> Cells:
    data = ad.read_h5ad(path)
    labelled = data.obs[label_key].notna() & ~data.obs[label_key].isin(left_out)
    data = data[labelled.to_numpy()].copy()
    labels = data.obs[label_key].astype(str).to_numpy()
    train, test = stratified_split(labels, test_fraction=0.2, seed=SPLIT_SEED)
    counts = data.X.tocsr()
    expression = log1p_cp10k(counts.indptr, counts.indices, counts.data, counts.shape[1])
    linear, square = expression[train], expression[train].multiply(expression[train])
    variance = np.asarray(square.mean(axis=0)).ravel() - np.asarray(linear.mean(axis=0)).ravel() ** 2
    chosen = np.sort(np.argsort(-variance, kind="stable")[:num_genes])
    return Cells(data[:, chosen].copy(), expression[:, chosen].toarray(), labels, train, test)


def baselines(cells: Cells) -> dict[str, np.ndarray]:
    """Predictions for the test cells."""
    names, counts = np.unique(cells.labels[cells.train], return_counts=True)
    regression = LogisticRegression(max_iter=2000).fit(
        cells.log_expression[cells.train], cells.labels[cells.train]
    )
    return {
        "majority class": np.full(len(cells.test), names[counts.argmax()]),
        "logistic regression": regression.predict(cells.log_expression[cells.test]),
    }


@torch.inference_mode()
def frozen_states(model: Scbert, cells: Cells, num_blocks: int) -> Tensor:
    """Every cell's states behind the blocks that are not trained, bfloat16 (cells, P, hidden_size)."""
    packed = model.tokenize(cells.data)
    if packed.num_cells != cells.data.n_obs:
        raise SystemExit(
            f"{cells.data.n_obs - packed.num_cells} cells have none of these genes; give more --genes"
        )
    positions, size = model.config.num_positions, model.config.hidden_size
    states = torch.empty(packed.num_cells, positions, size, dtype=torch.bfloat16)
    for start in range(0, packed.num_cells, CELLS_AT_ONCE):
        some = packed.select(slice(start, start + CELLS_AT_ONCE))
        bins = torch.zeros(some.num_cells, positions, dtype=torch.int64)
        cell = torch.repeat_interleave(torch.arange(some.num_cells), some.lengths)
        bins[cell, some.token_ids.long()] = some.values.long()
        hidden = model.performer.run(model.embed_bins(bins), offsets(bins), num_layers=num_blocks)[-1]
        states[start : start + some.num_cells] = hidden.view(-1, positions, size).to(torch.bfloat16)
    return states


def offsets(cells: Tensor) -> Tensor:
    return torch.arange(len(cells) + 1, dtype=torch.int32) * cells.shape[1]


def scores_of(model: Scbert, states: Tensor, num_blocks: int) -> Tensor:
    hidden = states.flatten(0, 1).float()
    hidden = model.performer.run(hidden, offsets(states), first=num_blocks)[-1]
    scores: Tensor = model.annotation_head(model.norm(hidden))
    return scores


@torch.inference_mode()
def predict(model: Scbert, states: Tensor, rows: np.ndarray, num_blocks: int) -> np.ndarray:
    parts = np.array_split(rows, max(len(rows) // CELLS_AT_ONCE, 1))
    return np.concatenate([scores_of(model, states[part], num_blocks).argmax(1).numpy() for part in parts])


def train_epoch(
    model: Scbert,
    optimizer: torch.optim.Optimizer,
    states: Tensor,
    classes: Tensor,
    order: np.ndarray,
    num_blocks: int,
    deadline: float,
) -> tuple[float, bool]:
    """Mean loss of the epoch, and whether the time sufficed for all of it."""
    total = 0.0
    for start in range(0, len(order), CELLS_A_STEP):
        step = order[start : start + CELLS_A_STEP]
        for rows in np.array_split(step, max(len(step) // CELLS_AT_ONCE, 1)):
            losses = annotation_losses(scores_of(model, states[rows], num_blocks), classes[rows])
            (losses.sum() / 3).backward()  # sixty means over three cells, as they accumulate there
            total += float(losses.detach().sum())
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1e6)
        optimizer.step()
        optimizer.zero_grad()
        if time.monotonic() > deadline:
            return total / (start + len(step)), False
    return total / len(order), True


def train(
    model: Scbert,
    states: Tensor,
    cells: Cells,
    arguments: argparse.Namespace,
    num_blocks: int,
    deadline: float,
) -> np.ndarray:
    """Predictions for the test cells at the epoch that was best on them, as the original keeps its best."""
    classes = class_numbers(model, cells.labels)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate(1))
    first, best, since, predicted = 1, -1.0, 0, np.zeros(0, dtype=np.int64)
    if arguments.resume is not None and arguments.resume.exists():
        kept = torch.load(arguments.resume, weights_only=True)
        model.load_state_dict(kept["model"])
        optimizer.load_state_dict(kept["optimizer"])
        first = kept["epoch"] + 1
    for epoch in range(first, arguments.epochs + 1):
        start = time.monotonic()
        optimizer.param_groups[0]["lr"] = learning_rate(epoch)
        order = np.random.default_rng([arguments.seed, epoch]).permutation(cells.train)
        loss, whole = train_epoch(model, optimizer, states, classes, order, num_blocks, deadline)
        found = predict(model, states, cells.test, num_blocks)
        accuracy = float((found == classes[cells.test].numpy()).mean())
        print(
            f"epoch {epoch:3}: rate {learning_rate(epoch):.1e}, loss {loss:.4f}, accuracy {accuracy:.4f}, "
            f"{time.monotonic() - start:.1f} s",
            flush=True,
        )
        since = 0 if accuracy > best else since + 1
        if accuracy > best:
            best, predicted = accuracy, found
        if not whole or time.monotonic() > deadline:
            print("the time is over")
            break
        if arguments.resume is not None:
            content = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch}
            torch.save(content, arguments.resume)
        if since >= PATIENCE and epoch > 2 * PATIENCE:
            print(f"no better accuracy for {PATIENCE} epochs")
            break
    return np.array(model.class_names)[predicted]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--label", default="cell_type")
    parser.add_argument("--leave-out", nargs="*", default=["unlabelled"], help="labels that are none")
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="of all, tokens and frozen blocks included"
    )
    parser.add_argument("--genes", type=int, default=100, help="of the panel")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--trained", choices=("authors", "head"), default="authors")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="state of the training, kept after each epoch")
    arguments = parser.parse_args()
    deadline = time.monotonic() + 60 * arguments.minutes
    torch.set_num_threads(2)
    cells = read_cells(arguments.data, arguments.label, arguments.leave_out, arguments.genes)
    panel = ScbertPanel([str(gene) for gene in cells.data.var_names])
    config = ScbertConfig(num_genes=len(panel), num_layers=arguments.layers)
    model = Scbert.from_config(config, panel, seed=arguments.seed)
    model.tokenizer = scfm.ScbertTokenizer(panel, gene_column="index")
    model.add_annotation_head(np.unique(cells.labels).tolist(), seed=arguments.seed)
    freeze(model, arguments.trained)
    num_blocks = arguments.layers - 2 if arguments.trained == "authors" else arguments.layers
    start = time.monotonic()
    states = frozen_states(model.set_compute_dtype("auto"), cells, num_blocks)
    model.set_compute_dtype("float32")
    print(
        f"{cells.data.n_obs:,} cells of {len(panel):,} genes, {len(cells.train):,} to train on; states behind "
        f"{num_blocks} frozen blocks: {states.nbytes / 2**20:,.0f} MiB in {time.monotonic() - start:.0f} s",
        flush=True,
    )
    rows = baselines(cells)
    rows[f"scBERT, random weights ({arguments.trained})"] = train(
        model, states, cells, arguments, num_blocks, deadline
    )
    codes = {name: number for number, name in enumerate(np.unique(cells.labels))}
    truth = cells.labels[cells.test]
    print(f"\n{'':36} accuracy  macro-F1   (best epoch on the test cells for scBERT, as its authors report)")
    for name, found in rows.items():
        coded = (np.array([codes[label] for label in labels]) for labels in (truth, found))
        print(f"{name:36} {np.mean(truth == found):8.4f}  {macro_f1(*coded):8.4f}")


if __name__ == "__main__":
    main()
