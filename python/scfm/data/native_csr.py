"""A CSR matrix in files, read by the native reader: threads that read, inflate, place and check rows.

Requests are handed over some way ahead of the consumer, as far as a fixed amount of memory allows, so reading
and whatever is done with the rows overlap. Where a column index does not even fit the native reader's type, the
rows are read once more by the plain reader, whose errors name the row and the index as it stands in the file.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.data.available_memory import require_memory
from scfm.data.matrix import CountMatrix, CsrParts
from scfm.data.stored_array import StoredArray
from scfm.errors import FormatError, InvalidArgumentError

__all__ = ["NativeCsr", "native_obstacle"]

# Rows asked for but not yet handed out: enough to keep every thread busy, little enough to stay in the cache
# where the blocks are small.
_BYTES_AHEAD = 32 << 20
_MOST_REQUESTS_AHEAD = 4  # a shuffled epoch has a stream for each of many files


def native_obstacle(data: StoredArray, indices: StoredArray, *, num_genes: int) -> str | None:
    """Why a matrix cannot be read natively, or None. SCFM_READER=h5py asks for the plain readers."""
    if os.environ.get("SCFM_READER", "native") != "native":
        return f"SCFM_READER={os.environ['SCFM_READER']}"
    if os.name != "posix":
        return "this system has no positioned reads"
    if indices.dtype.kind == "f":
        return f"{indices.name} has type {indices.dtype}"
    if num_genes > np.iinfo(np.int32).max:
        return f"{num_genes:,} genes"
    return data.obstacle() or indices.obstacle()


class NativeCsr(CountMatrix):
    """Rows of a CSR matrix whose data and indices are StoredArrays.

    indptr: int64 (num_cells + 1,), already checked; check_unchanged: raises IntegrityError when the files are no
    longer those that the tables describe; fallback: reads the same rows by other means.
    """

    def __init__(
        self,
        data: StoredArray,
        indices: StoredArray,
        indptr: NDArray[np.int64],
        *,
        name: str,
        dataset: str,
        num_cells: int,
        num_genes: int,
        check_unchanged: Callable[[], None],
        fallback: CountMatrix,
    ) -> None:
        super().__init__(name=name, dataset=dataset, num_cells=num_cells, num_genes=num_genes)
        self._data = data
        self._indices = indices
        self._indptr = np.ascontiguousarray(indptr, dtype=np.int64)
        self._check_unchanged = check_unchanged
        self._fallback = fallback
        encodings = dict.fromkeys((data.encoding(), indices.encoding()))
        self.reader = f"native ({'; '.join(encodings)})"

    def read(self, rows: NDArray[np.int64]) -> CsrParts:
        return next(self.stream([rows]))

    def stream(
        self, requests: Iterable[NDArray[np.int64]], *, validate: bool = True
    ) -> Generator[CsrParts, None, None]:
        """The rows of each request in turn, checked on the way unless ``validate`` is False (for benches)."""
        from scfm import _native

        self._check_unchanged()
        process = os.getpid()
        stream = _native.CsrStream(
            self._data.native(), self._indices.native(), self._indptr, self.num_genes, validate=validate
        )
        waiting: deque[tuple[NDArray[np.int64], int]] = deque()
        ahead = 0
        try:
            for rows in requests:
                size = self._bytes_of(rows)
                stream.submit(rows)
                waiting.append((rows, size))
                ahead += size
                while (len(waiting) > 1 and ahead > _BYTES_AHEAD) or len(waiting) > _MOST_REQUESTS_AHEAD:
                    first, its_size = waiting.popleft()
                    yield self._take(stream, first)
                    self._expect_process(process)
                    ahead -= its_size
            while waiting:
                yield self._take(stream, waiting.popleft()[0])
                self._expect_process(process)
        finally:
            stream.close()

    def _expect_process(self, process: int) -> None:
        if os.getpid() != process:
            raise InvalidArgumentError(
                "a pass over the cells that began before a fork cannot go on in the child",
                path=self.name,
                hint="Begin a new pass in each process.",
            )

    def _bytes_of(self, rows: NDArray[np.int64]) -> int:
        lengths = self._indptr[rows + 1] - self._indptr[rows]
        size = int(lengths.sum()) * (self._data.dtype.itemsize + 4)
        require_memory(
            size,
            purpose=f"reading {len(rows):,} cells",
            name=self.name,
            where=self.dataset,
            hint="Read fewer cells at a time.",
        )
        return size

    def _take(self, stream: Any, rows: NDArray[np.int64]) -> CsrParts:
        from scfm import _native

        try:
            indptr, indices, data, facts, columns_in_range = stream.take()
        except _native.ChunkError as error:
            self._check_unchanged()
            # The plain readers are no second opinion: HDF5 takes chunks that decode short, and fills them up
            # with whatever lay in memory.
            raise _chunk_failure(error.args) from error
        self._check_unchanged()
        if not columns_in_range:
            return self._fallback.read(rows)
        return CsrParts(indptr, indices, data, facts)


def _chunk_failure(facts: tuple[Any, ...]) -> FormatError:
    reason, array, chunk, path, offset, size = facts
    if offset < 0:
        return FormatError(
            f"chunk {chunk} was never written",
            path=path,
            where=f"{array}, chunk {chunk}",
            hint="The writing of this file was cut short; write it again.",
        )
    hint = "The file is damaged; copy, download or write it again."
    if reason.startswith(("reading failed", "the file cannot be opened")):
        hint = "The system refused; see whether the disk is well and how many files may be open (ulimit -n)."
    return FormatError(
        f"chunk {chunk} ({size:,} bytes at {offset:,}) cannot be read: {reason}",
        path=path,
        where=f"{array}, chunk {chunk}",
        hint=hint,
    )
