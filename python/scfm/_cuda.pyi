"""CUDA kernels (csrc/cuda) on tensors that lie on one GPU, taken through DLPack without copies. Work is queued on
``stream``, the address of a CUDA stream, and calls return before it is done. InvalidArgumentError names an argument
that does not fit; CudaError passes on what CUDA itself refuses."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from scfm.errors import ScfmError

class CudaError(ScfmError, RuntimeError): ...

def device_count() -> int:
    """GPUs that CUDA's runtime can use; 0 without a driver, or with one that is too old."""

def device_name(device: int) -> str: ...
def runtime_version() -> tuple[int, int]:
    """Of the CUDA runtime built in: (major, minor)."""

def graph_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    scale: float,
    stream: int,
) -> None:
    """Fills out, and the natural log-sum-exp float32 (T, H). Tensors (T, H, D) in one of float32, float16 and bfloat16,
    rows at multiples of 16 bytes and as long; offsets int64 (T + 1,), positions int32 (E,), which are trusted."""

def graph_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    delta: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    col_offsets: Tensor,
    rows: Tensor,
    scale: float,
    stream: int,
) -> None:
    """Fills dq, dk, dv, and delta float32 (T, H)."""

def gene_table(
    column_slot: NDArray[np.int32],
    slot_token: NDArray[np.int32],
    slot_median: NDArray[np.float64],
    num_single: int,
    arithmetic: str,
) -> tuple[
    NDArray[np.float64], NDArray[np.int32], NDArray[np.float64], NDArray[np.int32], NDArray[np.int32], str
]:
    """On the host: factors, tokens, summed_factors, summed_offsets and summed_columns of rank_value's table, and the
    arithmetic to be used (sums are always float64)."""

def check_rows(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    num_genes: int,
    found: Tensor,
    out_of_order: Tensor,
    stream: int,
) -> None:
    """found, int64 (4,): first bad place in indptr or -1, first entry with a column out of range or -1, rows whose
    columns do not strictly rise, the longest row. out_of_order, uint8 (cells,)."""

def row_sums(indptr: Tensor, data: Tensor, sums: Tensor, stream: int) -> None:
    """sums, float64 (cells,), as _native.row_sums. indptr is trusted."""

def num_long_row_blocks(num_rows: int, longest_row: int, num_summed: int) -> int:
    """How many rows at once must have room outside shared memory."""

def num_tokens_at_most(
    num_rows: int, num_entries: int, max_tokens: int, prefix_token: int, suffix_token: int
) -> int:
    """The size of token_ids that rank_value asks for."""

def rank_value(
    indptr: Tensor,
    indices: Tensor,
    data: Tensor,
    checked: tuple[int, ...],
    out_of_order: Tensor,
    library_size: Tensor,
    table: tuple[Tensor, ...],
    arithmetic: str,
    keep_zeros: bool,
    max_tokens: int,
    prefix_token: int,
    suffix_token: int,
    room: tuple[Tensor | None, ...],
    result: tuple[Any, ...],
    stream: int,
) -> None:
    """checked: check_rows' found, read back. table: gene_table's first five. room: ordered columns int32, values
    float64 (entries,) and counts int32 (cells,), needed where rows are out of order; keys int64 and ids int32 of
    num_long_row_blocks * longest row. result: token_ids, counts float64 or None, cu_seqlens int64, num_gene_tokens
    int32, mapped_counts and total_counts float64. checked and the table's contents are trusted."""
