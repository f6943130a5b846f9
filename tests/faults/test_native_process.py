"""Fault rows 51 to 55: threads, forks, failing workers, Ctrl-C, plain processors and too little memory."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import zlib
from pathlib import Path

import h5py
import numpy as np
import pytest
from counts_files import dense, poisson_matrix, read_and_sum, write_matrix
from run_child import run_child

from scfm import _native
from scfm.data.read import read
from scfm.errors import FormatError, ScfmError, ScfmWarning

NUM_CELLS, NUM_GENES = 900, 60
MATRIX = poisson_matrix(NUM_CELLS, NUM_GENES)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_matrix(tmp_path / "cells.h5ad", MATRIX, chunk=211)


# --- row 51: many threads, and forks after them ---


def test_row_51_threads_read_the_same_file(path: Path, reader: str) -> None:
    """Half of the threads share one source, the others open their own."""
    expected = MATRIX.toarray()
    shared = read(path)
    found: dict[int, np.ndarray] = {}
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for block_size in (7, 64, 900):
                found[number] = dense(shared if number % 2 else read(path), block_size)
                np.testing.assert_array_equal(found[number], expected)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)
    assert not failures
    assert len(found) == 6


def test_row_51_two_passes_at_once(path: Path, reader: str) -> None:
    source = read(path)
    first, second = source.blocks(50), source.select(slice(None, None, -1)).blocks(50)
    for one, other in zip(first, second, strict=True):
        for block in (one, other):
            counts = np.zeros((block.num_cells, NUM_GENES))
            counts[np.repeat(np.arange(block.num_cells), np.diff(block.indptr)), block.indices] = block.data
            np.testing.assert_array_equal(counts, MATRIX.toarray()[block.rows])


def test_row_51_abandoned_passes(path: Path, reader: str) -> None:
    """Passes that nobody finishes leave no thread and no open file behind."""
    source = read(path)
    next(source.blocks(10))
    threads, files = len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))
    for _ in range(30):
        next(source.blocks(10))
    assert len(os.listdir("/proc/self/task")) <= threads + 1
    assert len(os.listdir("/proc/self/fd")) <= files + 1


def _in_fork(queue: multiprocessing.Queue[float], source: object, half_done: list[object]) -> None:
    half_done.clear()  # the parent's pass, whose threads are not here
    queue.put(float(dense(source, 50).sum()))  # type: ignore[arg-type]


def test_row_51_fork_after_threads_and_in_the_middle_of_a_pass(path: Path, reader: str) -> None:
    source = read(path)
    dense(source)
    blocks = source.blocks(10)
    next(blocks)
    context = multiprocessing.get_context("fork")
    queue: multiprocessing.Queue[float] = context.Queue()
    child = context.Process(target=_in_fork, args=(queue, source, [blocks]), daemon=True)
    child.start()
    try:
        assert queue.get(timeout=30) == MATRIX.sum()
        child.join(timeout=30)
        assert child.exitcode == 0
    finally:
        child.kill()
    assert sum(block.num_cells for block in blocks) == NUM_CELLS - 10


# --- row 52: a worker thread fails ---


def test_row_52_failing_workers_raise_in_order(tmp_path: Path, reader: str) -> None:
    """Of many damaged chunks the first in the order of the rows is told of, every time; then all goes on."""
    path = write_matrix(tmp_path / "damaged.h5ad", MATRIX, chunk=211)
    with h5py.File(path) as file:
        chunks = [file["X/data"].id.get_chunk_info(i) for i in range(20, 100)]
    with open(path, "r+b") as raw:
        for stored in chunks:
            raw.seek(stored.byte_offset)
            raw.write(b"\xff" * stored.size)
    sound = int(np.searchsorted(MATRIX.indptr, 20 * 211))  # the rows before the first damaged chunk
    messages = set()
    # The rows that scfm.read samples are damaged too.
    with pytest.raises(FormatError, match="X/data"):
        read(path)
    whole = write_matrix(tmp_path / "whole.h5ad", MATRIX, chunk=211)
    content = path.read_bytes()
    for _ in range(8):
        path.write_bytes(whole.read_bytes())
        source = read(path)
        before = path.stat()
        path.write_bytes(content)
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        blocks = source.blocks(20)
        seen = 0
        with pytest.raises(ScfmError) as caught:
            for block in blocks:
                seen += block.num_cells
        assert seen == (sound - 1) // 20 * 20
        assert "X/data" in str(caught.value)
        messages.add(str(caught.value))
    assert len(messages) == 1
    np.testing.assert_array_equal(dense(read(whole)), MATRIX.toarray())


# --- row 53: Ctrl-C ---

INTERRUPTED = """
import mmap, sys, time
import numpy as np
import scfm
from scfm import _native

def zeros(count, kind):
    # Pages that are only read all are the kernel's one page of zeros: no memory is used.
    size = count * np.dtype(kind).itemsize
    private_anonymous_noreserve = 0x02 | 0x20 | 0x4000
    return np.frombuffer(mmap.mmap(-1, size, flags=private_anonymous_noreserve), kind)

def check_csr():
    count = 1 << 34
    _native.set_num_threads(1)
    pointers = np.arange(0, count + 1, 1 << 16, dtype=np.int64)
    data, indices = zeros(count, "u1"), zeros(count, "i4")
    ready()
    _native.check_csr(pointers, indices, data, 100)

def rank_value():
    import torch
    from scfm.tokenize.dictionaries import GeneformerDictionaries
    import anndata, scipy.sparse as sp, pandas as pd
    genes = [f"ENSG{i:011d}" for i in range(1, 3001)]
    vocab = GeneformerDictionaries.from_vocabulary(genes, dict.fromkeys(genes, 1.0), "V2")
    counts = np.random.default_rng(0).integers(1, 9, (20_000, 3000)).astype(np.uint8)
    pointers = np.arange(0, counts.size + 1, 3000, dtype=np.int64)
    columns = np.tile(np.arange(3000, dtype=np.int32), 20_000)
    matrix = sp.csr_matrix((counts.ravel(), columns, pointers), shape=counts.shape)
    adata = anndata.AnnData(matrix, var=pd.DataFrame(index=genes))
    tokenizer = scfm.GeneformerTokenizer(vocab)
    _native.set_num_threads(1)
    source = scfm.read(adata)
    ready()
    for _ in range(100):
        for _ in tokenizer.packs(source, block_size=20_000):
            pass

def blocks():
    source = scfm.read(sys.argv[2])
    ready()
    for _ in range(100):
        for _ in source.blocks():
            pass

def one_block():
    source = scfm.read(sys.argv[2])
    ready()
    next(source.blocks(len(source)))

def ready():
    print("ready", flush=True)

try:
    globals()[sys.argv[1]]()
except KeyboardInterrupt:
    print(time.monotonic_ns(), flush=True)
    raise SystemExit(130)
print("finished before the signal came", flush=True)
"""


@pytest.fixture(scope="module")
def long_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2^28 values in a file of a few megabytes: every chunk is the same 64 rows."""
    path = tmp_path_factory.mktemp("long") / "long.h5ad"
    per_row, rows_per_chunk, num_chunks = 1024, 64, 4096
    num_cells, num_values = rows_per_chunk * num_chunks, rows_per_chunk * num_chunks * per_row
    rng = np.random.default_rng(0)
    columns = np.concatenate([np.sort(rng.choice(4096, per_row, replace=False)) for _ in range(64)])
    pieces = {"data": rng.integers(1, 5, len(columns)).astype("f4"), "indices": columns.astype("i4")}
    with h5py.File(path, "w") as file:
        group = file.create_group("X")
        group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", [num_cells, 4096]
        group["indptr"] = np.arange(0, num_values + 1, per_row, dtype=np.int64)
        for name, piece in pieces.items():
            dataset = group.create_dataset(
                name, shape=(num_values,), chunks=(len(piece),), dtype=piece.dtype, compression="gzip"
            )
            stored = zlib.compress(piece.tobytes(), 4)
            for start in range(0, num_values, len(piece)):
                dataset.id.write_direct_chunk((start,), stored)
        for place, length in (("obs", num_cells), ("var", 4096)):
            table = file.create_group(place)
            table.attrs["_index"], table.attrs["column-order"] = "_index", np.array([], dtype="S1")
            table.create_dataset("_index", shape=(length,), dtype="S1")
    return path


@pytest.mark.parametrize("call", ["check_csr", "rank_value", "blocks", "one_block"])
def test_row_53_ctrl_c(call: str, request: pytest.FixtureRequest) -> None:
    """KeyboardInterrupt within a second of the signal, out of the middle of a native call."""
    arguments = [str(request.getfixturevalue("long_file"))] if "block" in call else []
    child = subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED, call, *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        threading.Event().wait(0.4)
        sent = time.monotonic_ns()  # the same clock in every process of a machine
        child.send_signal(signal.SIGINT)
        answer, _ = child.communicate(timeout=30)
    finally:
        child.kill()
    assert answer.strip().isdigit(), answer
    assert (int(answer) - sent) / 1e9 < 1
    assert child.returncode == 130


# --- row 54: a plain processor ---


def tokens(path: str) -> list[list[int]]:
    # Here, because children of run_child import this module and have no use for torch.
    from scfm.tokenize.dictionaries import GeneformerDictionaries
    from scfm.tokenize.geneformer import GeneformerTokenizer

    genes = [f"GENE{i}" for i in range(NUM_GENES)]
    medians = {gene: 0.5 + i % 7 for i, gene in enumerate(genes)}
    vocab = GeneformerDictionaries.from_vocabulary(genes, medians, "V2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ScfmWarning)
        return GeneformerTokenizer(vocab)(path).to_lists()


PLAIN = """
import json, sys
sys.path.insert(0, sys.argv[1])
from test_native_process import _native, tokens
print(json.dumps([_native.active_isa(), tokens(sys.argv[2])]))
"""


def test_row_54_a_plain_processor_gives_the_same_ids(path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, str(Path(__file__).parent), str(path)],
        capture_output=True, text=True, env={**os.environ, "SCFM_ISA": "generic"}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    isa, plain = json.loads(done.stdout)
    assert isa == "generic"
    assert sum(map(len, plain)) > 10_000
    before = _native.active_isa()
    try:
        for name in _native.available_isas():
            _native.set_isa(name)
            assert tokens(str(path)) == plain
    finally:
        _native.set_isa(before)


# --- row 55: memory runs out ---


def test_row_55_too_little_memory(path: Path, reader: str) -> None:
    """Whatever the limit: the right sum, or an error of memory; never a crash, a hang or another error."""
    ends = []
    for step in range(24):
        outcome = run_child(read_and_sum, str(path), memory=int((1 << 16) * 1.45**step), timeout=30)
        if outcome.kind == "ok":
            assert outcome.value == MATRIX.sum()
        else:
            assert outcome.raised("MemoryError"), (step, outcome)
        ends.append(outcome.kind)
    assert ends[0] == "raised" and ends[-1] == "ok"
