"""A million cells embedded twice: undisturbed, and killed three times and resumed. The bytes must be the same.

The atlas is generated (48 to 80 genes a cell) and the model has one layer of width 32: what is tested is the
machinery around the model. Two workers of one thread share each folder; a kill is SIGKILL to both at once.

    python benches/resume_million_cells.py [--cells 1000000] [--folder DIR] [--gzip]
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from anndata.io import write_elem

from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.tokenize.dictionaries import GeneformerDictionaries

NUM_GENES = 2_000
BLOCK = 65_536
GENES = [f"ENSG{number:011d}" for number in range(1, NUM_GENES + 1)]


def write_atlas(path: Path, num_cells: int, *, compression: str | None) -> None:
    """CSR counts appended block by block: memory does not grow with the atlas."""
    generator = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        write_elem(file, "obs", pd.DataFrame(index=[str(cell) for cell in range(num_cells)]))
        write_elem(file, "var", pd.DataFrame(index=GENES))
        counts = file.create_group("X")
        counts.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        counts.attrs["shape"] = np.array([num_cells, NUM_GENES])
        options = {"maxshape": (None,), "chunks": (1 << 18,), "compression": compression}
        data = counts.create_dataset("data", shape=(0,), dtype=np.float32, **options)
        indices = counts.create_dataset("indices", shape=(0,), dtype=np.int32, **options)
        lengths = []
        for start in range(0, num_cells, BLOCK):
            sizes = generator.integers(48, 81, min(BLOCK, num_cells - start))
            lengths.append(sizes)
            columns = some_columns(generator, sizes)
            end = len(data) + len(columns)
            data.resize((end,))
            indices.resize((end,))
            indices[end - len(columns) :] = columns
            data[end - len(columns) :] = generator.integers(1, 20, len(columns)).astype(np.float32)
        counts["indptr"] = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)


def some_columns(generator: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Distinct columns of every cell, ascending: steps of 7 from anywhere, round the end, then sorted."""
    cells = np.repeat(np.arange(len(sizes)), sizes)
    position = np.arange(len(cells)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    first = generator.integers(0, NUM_GENES, len(sizes))[cells]
    keys = np.sort(cells * NUM_GENES + (first + 7 * position) % NUM_GENES)
    return (keys % NUM_GENES).astype(np.int32)


def save_model(folder: Path) -> None:
    config = GeneformerConfig(
        num_layers=1, hidden_size=32, num_heads=2, ffn_size=64, max_tokens=128, vocab_size=NUM_GENES + 4,
        hidden_dropout=0.0, attention_dropout=0.0, initializer_range=0.3,
    )  # fmt: skip
    medians = {gene: 1.0 + number % 7 for number, gene in enumerate(GENES)}
    vocab = GeneformerDictionaries.from_vocabulary(GENES, medians, version="V2")
    Geneformer.from_config(config, vocab, seed=1).save(folder)


def start_workers(atlas: Path, model: Path, out: Path) -> list[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from scfm.cli.main import app; app()", "embed", str(atlas)]
    command += ["--model", str(model), "--out", str(out)]
    command += [
        "--layer",
        "0",
        "--dtype",
        "float32",
        "--threads",
        "1",
        "--token-budget",
        "32768",
        "--shard-size",
        "16384",
        "--json",
    ]
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]


def finish(workers: list[subprocess.Popen[str]]) -> list[dict]:
    said = [worker.communicate()[0] for worker in workers]
    assert all(worker.returncode == 0 for worker in workers), said
    return [json.loads(text) for text in said]


def killed_three_times(atlas: Path, model: Path, out: Path, undisturbed_seconds: float) -> float:
    """Seconds in all. Each attempt lives for a third of what the whole takes, then dies at once."""
    begun = time.perf_counter()
    for number in range(1, 4):
        workers = start_workers(atlas, model, out)
        time.sleep(undisturbed_seconds / 3)
        for worker in workers:
            worker.send_signal(signal.SIGKILL)
        codes = [worker.wait() for worker in workers]
        done = len(list(out.glob("part-*.json")))
        print(f"kill {number}: exit codes {codes}, {done} shards finished", flush=True)
        assert codes == [-signal.SIGKILL] * 2
    finish(start_workers(atlas, model, out))
    return time.perf_counter() - begun


def expect_equal(first: Path, second: Path) -> int:
    names = sorted(path.name for path in first.glob("part-*.npy"))
    assert names == sorted(path.name for path in second.glob("part-*.npy"))
    different = [name for name in names if not filecmp.cmp(first / name, second / name, shallow=False)]
    assert not different, different
    return len(names)


def run(folder: Path, num_cells: int, compression: str | None) -> None:
    atlas, model = folder / "atlas.h5ad", folder / "model"
    begun = time.perf_counter()
    write_atlas(atlas, num_cells, compression=compression)
    save_model(model)
    print(
        f"atlas: {num_cells:,} cells, {atlas.stat().st_size / 1e6:,.0f} MB, {time.perf_counter() - begun:.1f} s"
    )
    begun = time.perf_counter()
    said = finish(start_workers(atlas, model, folder / "undisturbed"))
    seconds = time.perf_counter() - begun
    working = max(worker["seconds"] for worker in said)
    computed = sum(worker["cells_computed"] for worker in said)
    assert computed == num_cells and all(worker["complete"] for worker in said)
    print(
        f"undisturbed: {seconds:.1f} s with start-up, {working:.1f} s of work, {num_cells / working:,.0f} cells/s "
        f"in two workers, {said[0]['num_tokens'] / working:,.0f} tokens/s"
    )
    disturbed = killed_three_times(atlas, model, folder / "killed", seconds)
    print(f"killed three times: {disturbed:.1f} s")
    num_shards = expect_equal(folder / "undisturbed", folder / "killed")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{num_shards} shards are equal, byte for byte; peak resident memory of a worker {peak:,.0f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--gzip", action="store_true")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        run(chosen.folder or Path(scratch), chosen.cells, "gzip" if chosen.gzip else None)


if __name__ == "__main__":
    main()
