"""``scfm export``: a finished folder of shards as one file: .npy, .zarr, .parquet or a copy of the .h5ad.

A shard at a time passes through memory, and its checksum is compared on the way: a folder that is incomplete or
damaged gives an error and no file. What is written appears whole under its name or not at all.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

import scfm
from scfm.data.atomic_file import reserve, whole_file, whole_folder
from scfm.embed.commit import npy_header
from scfm.embed.files import check_h5ad_copy, write_h5ad_copy
from scfm.embed.fingerprint import fingerprint_of
from scfm.embed.plan import InputFile, Shard
from scfm.embed.store import EmbeddingStore, open_store
from scfm.errors import IntegrityError, InvalidArgumentError, MissingDependencyError

__all__ = ["ExportSummary", "export_store"]

# Few enough files for a file system, small enough to read some cells from far away.
ZARR_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class ExportSummary:
    """shape: (rows, hidden_size) written; num_left_out: cells without known genes, under the policy "skip"."""

    out: str
    shape: tuple[int, int]
    dtype: str
    num_left_out: int


@dataclass(frozen=True)
class _Export:
    """The shards to write, whether cells without genes stay out, and how many rows that makes."""

    store: EmbeddingStore
    shards: tuple[Shard, ...]
    skip: bool

    @property
    def num_left_out(self) -> int:
        if not self.skip:
            return 0
        return sum(len(self.store.manifest(shard).without_genes) for shard in self.shards)

    @property
    def shape(self) -> tuple[int, int]:
        return sum(s.num_cells for s in self.shards) - self.num_left_out, self.store.hidden_size

    def pieces(self) -> Iterator[tuple[Shard, np.ndarray, np.ndarray]]:
        """Each shard, the rows of the input that are written, and their embeddings, checksum compared."""
        for shard in self.shards:
            manifest = self.store.manifest(shard)
            values = _read_checked(self.store, shard, manifest.crc32)
            rows = np.arange(shard.row_start, shard.row_end, dtype=np.int64)
            if self.skip and manifest.without_genes:
                kept = ~np.isin(rows, manifest.without_genes)
                rows, values = rows[kept], values[kept]
            yield shard, rows, values

    def facts(self) -> dict[str, Any]:
        """Plain provenance; AnnData's ``uns`` takes no None and no lists of mappings."""
        plan = self.store.plan
        first = self.store.manifest(self.shards[0]).provenance if self.shards else {}
        return {
            "family": plan.model["family"],
            "model": str(first.get("model", "")),
            "weights_sha256": plan.model["weights_sha256"],
            "model_sha256": plan.model["sha256"],
            "plan_sha256": plan.sha256,
            "layer": plan.layer,
            "pooling": plan.pooling,
            "dtype": plan.compute_dtype,
            "store_dtype": plan.store_dtype,
            "on_bad_cell": plan.on_bad_cell,
            "num_left_out": self.num_left_out,
            "sources": _distinct_names(plan.files),
            "source_cells": [file.num_cells for file in plan.files],
            "scfm_version": scfm.__version__,
        }


def export_store(
    folder: str | Path, out: str | Path, *, input_file: str | Path | None = None, key: str | None = None
) -> ExportSummary:
    """Write the embeddings in ``folder`` to ``out``; the ending says how.

    .npy: one array, with OUT.json beside it. .zarr: one zarr v3 array, provenance in its attributes. .parquet:
    file (its path where inputs share a name), row, embedding. .h5ad: a copy of the input (of several:
    ``input_file``) with obsm[key], where cells without known genes are rows of NaN. Else they are left out if the
    run's policy was "skip". OUT may be no input, nothing in the folder, and no .h5ad of another make.
    Raises MissingFileError for unfinished, IntegrityError for damaged shards, StorageError.
    """
    store, out = open_store(folder), Path(out)
    writers: dict[str, Callable[[_Export, Path], None]] = {
        ".npy": _write_npy,
        ".zarr": _write_zarr,
        ".parquet": _write_parquet,
    }
    if out.suffix not in (*writers, ".h5ad"):
        raise InvalidArgumentError("expected an ending .npy, .zarr, .parquet or .h5ad", path=out, where="OUT")
    if "/" in (key or ""):
        raise InvalidArgumentError(f"{key!r} may not contain '/'", where="key")
    _refuse_to_overwrite(store, out)
    missing = store.missing
    if missing:
        store.manifest(missing[0])  # says what to do
    if out.suffix == ".h5ad":
        return _export_h5ad(store, out, input_file, key or f"X_{store.plan.model['family']}")
    if input_file is not None or key is not None:
        raise InvalidArgumentError(
            "is for .h5ad only", where="input_file" if input_file is not None else "key"
        )
    export = _Export(store, store.shards, store.plan.on_bad_cell == "skip")
    writers[out.suffix](export, out)
    return ExportSummary(str(out), export.shape, str(store.dtype), export.num_left_out)


def _refuse_to_overwrite(store: EmbeddingStore, out: Path) -> None:
    """Neither the raw counts nor the shards may be what the export takes the place of."""
    target = out.resolve()
    folder = store.folder.resolve()
    if target == folder or folder in target.parents:
        raise InvalidArgumentError("lies in the folder that is exported", path=out, hint="Write elsewhere.")
    for file in store.plan.files:
        entry = Path(file.path)
        if entry.resolve() == target or (out.exists() and entry.exists() and entry.samefile(out)):
            raise InvalidArgumentError(
                "is one of the files that were embedded", path=out, hint="Write to another file."
            )


def _read_checked(store: EmbeddingStore, shard: Shard, crc32: int) -> np.ndarray:
    mapped = store.shard_array(shard)
    path = store.folder / shard.array_name
    content = path.read_bytes()
    if zlib.crc32(content) != crc32:
        raise IntegrityError(
            "its bytes have changed since they were written",
            path=path,
            hint="Run the scfm embed command again with --verify, which computes it anew.",
        )
    return np.frombuffer(content, dtype=mapped.dtype, offset=len(content) - mapped.nbytes).reshape(
        mapped.shape
    )


def _write_npy(export: _Export, out: Path) -> None:
    description = out.with_name(out.name + ".json")
    header = npy_header(export.shape, export.store.dtype)
    num_bytes = len(header) + export.shape[0] * export.shape[1] * export.store.dtype.itemsize
    with whole_file(out) as temporary:
        with temporary.open("r+b", buffering=0) as file:
            reserve(file.fileno(), num_bytes)
            _write_whole(file.fileno(), header)
            for _, _, values in export.pieces():
                _write_whole(file.fileno(), np.ascontiguousarray(values).reshape(-1).data)
        description.unlink(missing_ok=True)  # an old one must never stand beside new numbers
    with whole_file(description) as temporary:
        temporary.write_text(json.dumps(export.facts(), indent=2) + "\n", encoding="utf-8")


def _write_whole(handle: int, content: bytes | memoryview) -> None:
    view = memoryview(content).cast("B")
    while len(view):
        view = view[os.write(handle, view[: 64 << 20]) :]


def _write_zarr(export: _Export, out: Path) -> None:
    try:
        import zarr
    except ImportError as error:
        raise MissingDependencyError(
            "writing .zarr needs zarr", hint="Install it: pip install 'zarr>=3'."
        ) from error
    rows, width = export.shape
    chunk = max(1, min(rows or 1, ZARR_CHUNK_BYTES // max(width * export.store.dtype.itemsize, 1)))
    with whole_folder(out) as partial:
        array = zarr.create_array(
            store=str(partial),
            shape=export.shape,
            chunks=(chunk, width),
            dtype=export.store.dtype,
            compressors=None,  # embeddings do not compress
            fill_value=float("nan"),
            attributes=export.facts(),
            zarr_format=3,
            overwrite=True,
        )
        start = 0
        waiting = np.empty((0, width), dtype=export.store.dtype)
        for _, _, values in export.pieces():
            # Whole chunks only, or zarr would read back and rewrite those that two shards share.
            waiting = np.concatenate([waiting, values]) if len(waiting) else values
            whole = len(waiting) // chunk * chunk
            array[start : start + whole] = waiting[:whole]
            start, waiting = start + whole, waiting[whole:]
        array[start:] = waiting


def _distinct_names(files: tuple[InputFile, ...]) -> list[str]:
    """What tells the inputs apart: their names; where two share one, paths; and numbers if even those agree."""
    names = [file.name for file in files]
    if len(set(names)) < len(names):
        names = [file.path for file in files]
    if len(set(names)) < len(names):
        names = [f"{number}: {name}" for number, name in enumerate(names)]
    return names


def _write_parquet(export: _Export, out: Path) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingDependencyError(
            "writing .parquet needs pyarrow", hint="Install it: pip install pyarrow."
        ) from error
    number = pa.from_numpy_dtype(export.store.dtype)
    names = _distinct_names(export.store.plan.files)
    width = export.store.hidden_size
    schema = pa.schema(
        [("file", pa.string()), ("row", pa.int64()), ("embedding", pa.list_(number, width))],
        metadata={"scfm": json.dumps(export.facts())},
    )
    with (
        whole_file(out) as temporary,
        pq.ParquetWriter(temporary, schema, compression="none", use_dictionary=["file"]) as writer,
    ):
        for shard, rows, values in export.pieces():
            name = names[shard.file]
            flat = pa.array(np.ascontiguousarray(values).reshape(-1), type=number)
            columns = [
                pa.array([name] * len(rows), type=pa.string()),
                pa.array(rows),
                pa.FixedSizeListArray.from_arrays(flat, width),
            ]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema))


def _export_h5ad(store: EmbeddingStore, out: Path, input_file: str | Path | None, key: str) -> ExportSummary:
    number, source = _chosen_input(store, input_file)
    check_h5ad_copy(source, out)
    entry = store.plan.files[number]
    found = fingerprint_of(source)
    if (found.size, found.crc32) != (entry.size, entry.crc32):
        raise IntegrityError("is not the file that was embedded: its contents differ", path=source)
    export = _Export(store, tuple(s for s in store.shards if s.file == number), skip=False)

    def fill(dataset: h5py.Dataset) -> None:
        for _, rows, values in export.pieces():
            dataset[rows[0] : rows[-1] + 1] = values

    write_h5ad_copy(source, out, (export.shape, store.dtype, fill), key, export.facts())
    return ExportSummary(str(out), export.shape, str(store.dtype), 0)


def _chosen_input(store: EmbeddingStore, input_file: str | Path | None) -> tuple[int, Path]:
    files = store.plan.files
    if input_file is None:
        if len(files) != 1:
            raise InvalidArgumentError(
                f"the folder holds the embeddings of {len(files)} files; a copy is made of one",
                where="OUT",
                hint=f"Say which with --input: {', '.join(file.name for file in files[:5])}.",
            )
        return 0, _as_h5ad(Path(files[0].path), files[0])
    path = Path(input_file)
    named = [number for number, file in enumerate(files) if Path(file.path).resolve() == path.resolve()][:1]
    named = named or [number for number, file in enumerate(files) if file.name == path.name]
    if len(named) != 1:
        raise InvalidArgumentError(
            f"{'is not' if not named else 'could be several'} of the embedded files: "
            f"{', '.join(file.name for file in files[:5])}",
            path=path,
            where="--input",
        )
    return named[0], _as_h5ad(path, files[named[0]])


def _as_h5ad(path: Path, file: InputFile) -> Path:
    if not file.name.endswith(".h5ad"):
        raise InvalidArgumentError(
            "is no .h5ad, of which a copy could be made", path=path, hint="Export to .npy."
        )
    return path
