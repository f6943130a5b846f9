"""The C++ core (csrc/). Arrays are one-dimensional, contiguous, aligned numpy arrays of exactly the types named;
they are taken without copies, read-only ones too. TypeError or ValueError names the argument that does not fit."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[Any]
"""float32, float64 or any integer type of 8 to 64 bits."""
Columns = NDArray[np.int32] | NDArray[np.int64]

def available_isas() -> list[str]:
    """Instruction sets that run on this processor, plainest first: generic, avx2, avx512, avx512_bf16."""

def active_isa() -> str:
    """The one in use: the best, unless SCFM_ISA or set_isa forces another. ValueError if SCFM_ISA cannot run."""

def set_isa(name: str) -> None: ...
def cpu_features() -> dict[str, bool]:
    """avx2, fma, avx512f, avx512bw, avx512vl, avx512dq, avx512_bf16, amx_bf16: supported and enabled."""

def set_num_threads(count: int) -> None:
    """Threads for native work, 1 to 1024."""

def get_num_threads() -> int: ...
def _throw_in_tasks(num_tasks: int, failing: list[int]) -> None: ...

class CsrCheck:
    """What check_csr found. With an error only row, position, column and value mean something."""

    @property
    def error(self) -> str:
        """ "", indptr_start, indptr_decreasing, indptr_end, length, index_range, not_finite or negative."""
    @property
    def row(self) -> int: ...
    @property
    def position(self) -> int:
        """In data; -1 where the fault lies in indptr."""
    @property
    def column(self) -> int: ...
    @property
    def value(self) -> float:
        """The value there; for faults of indptr or length, the offset or length found."""
    @property
    def sorted(self) -> bool:
        """Every row's columns never fall."""
    @property
    def duplicates(self) -> int:
        """Rows that hold some column twice."""
    @property
    def num_zeros(self) -> int:
        """Stored zeros."""
    @property
    def num_nonintegers(self) -> int: ...
    @property
    def first_noninteger(self) -> int:
        """First row with a fractional value, or -1."""
    @property
    def max_value(self) -> float: ...

def check_csr(indptr: NDArray[np.int64], indices: Columns, data: Counts, num_genes: int) -> CsrCheck:
    """One pass over a CSR block (indptr from 0): its first fault by position, or the facts of its values."""

def row_sums(indptr: NDArray[np.int64], data: Counts) -> NDArray[np.float64]:
    """Sum of the stored values of each row."""

class RankValueResult:
    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Packed, special tokens included."""
    @property
    def cu_seqlens(self) -> NDArray[np.int64]:
        """num_cells + 1 offsets; a cell without gene tokens has length 0, special tokens included."""
    @property
    def counts(self) -> NDArray[np.float64] | None:
        """x / n * 10,000 of each token, 0 at special ones; None unless asked for."""
    @property
    def num_gene_tokens(self) -> NDArray[np.int32]:
        """Per cell, before cutting to max_tokens, without special tokens."""
    @property
    def mapped_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of the values in columns that have a slot."""
    @property
    def total_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of all values."""

def rank_value(
    indptr: NDArray[np.int64],
    indices: Columns,
    data: Counts,
    library_size: NDArray[np.float64],
    column_slot: NDArray[np.int32],
    slot_token: NDArray[np.int32],
    slot_median: NDArray[np.float64],
    num_single: int,
    arithmetic: str,
    keep_zeros: bool,
    max_tokens: int,
    prefix_token: int,
    suffix_token: int,
    with_counts: bool,
) -> RankValueResult:
    """Geneformer's rank-value encoding of a CSR block of raw counts.

    column_slot gives each column's slot, -1 for no token. Slots below num_single are fed by one column each, in
    the order of the columns; later ones sum several columns (any there makes the arithmetic 64-bit). arithmetic
    is multiply64, multiply32, divide64 or divide32. Tokens rank by value descending, equal ones by slot.
    max_tokens, prefix_token and suffix_token are -1 for none. Columns need not be sorted; values of one column
    are summed.
    """

def first_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """The bin of each item: items are placed in their order, each into the first bin that has room for it.

    lengths: 1 to capacity. Bins are numbered as they are opened. Raises ValueError.
    """

def gene_values(
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    data: NDArray[Any],
    column_gene: NDArray[np.int32],
    library_size: NDArray[np.float64],
    counted: NDArray[np.uint8],
) -> NDArray[np.uint64]:
    """For each non-zero entry of a wanted gene: gene << 32 | bits of float32(count / library_size * 10,000).

    column_gene: the gene each column counts for, or -1; counted: whether each cell counts, empty for all.
    Raises ValueError, TypeError.
    """

def merge_keys(
    keys: NDArray[np.uint64], numbers: NDArray[np.int64], more: NDArray[np.uint64], num_bits: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Different ascending keys and their numbers, with ``more`` (ascending) merged in, all without their last bits.

    Raises ValueError, TypeError.
    """

def mlm_mask(
    token_ids: NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
    cell_ids: NDArray[np.int64],
    seed: int,
    epoch: int,
    probability: float,
    mask_token: int,
    vocab_size: int,
    never_masked: list[int],
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """BERT masking of packed tokens: (ids as the model sees them, selected positions ascending).

    Of the tokens selected 80% become mask_token, 10% a random id below vocab_size, 10% stay. Depends on seed,
    epoch, cell id and position in the cell only.
    """

class LogBinsResult:
    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Packed panel positions with a bin above 0, ascending in each cell."""
    @property
    def values(self) -> NDArray[np.float32]:
        """Their bins, 1 to 5."""
    @property
    def cu_seqlens(self) -> NDArray[np.int64]:
        """num_cells + 1 offsets."""
    @property
    def num_panel_genes(self) -> NDArray[np.int32]:
        """Per cell, panel genes with a value above 0, whatever their bin."""
    @property
    def mapped_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of the values on the panel."""
    @property
    def total_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of all values."""

def log_bins(
    indptr: NDArray[np.int64],
    indices: Columns,
    data: Counts,
    column_position: NDArray[np.int32],
    panel_size: int,
    already_logged: bool,
) -> LogBinsResult:
    """scBERT's bins of a CSR block: min(floor(log2(1 + 10,000 c / N)), 5), N the cell's total on the panel.

    Whole counts are compared exactly; other values go through float32. column_position gives each column's place on
    the panel, -1 for none. already_logged: the values are log2(1 + x) and only truncated. Raises ValueError naming
    argument and row.
    """

class ReadDepthResult:
    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Packed positions; num_positions is T, num_positions + 1 is S."""
    @property
    def values(self) -> NDArray[np.float32]:
        """Normalised expression, and depths at T and S; all above zero."""
    @property
    def cu_seqlens(self) -> NDArray[np.int64]:
        """num_cells + 1 offsets."""
    @property
    def num_gene_tokens(self) -> NDArray[np.int32]:
        """Per cell; 0, and no tokens, where no gene stands in front of the last two tokens."""
    @property
    def mapped_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of the values in columns that have a position."""
    @property
    def total_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of all values."""
    @property
    def target_depth(self) -> NDArray[np.float32]:
        """Per cell T, also where it is no token."""
    @property
    def source_depth(self) -> NDArray[np.float32]:
        """Per cell S, also where it is no token."""

def read_depth(
    indptr: NDArray[np.int64],
    indices: Columns,
    data: Counts,
    column_position: NDArray[np.int32],
    num_positions: int,
    values: str,
    total: str,
    totals: NDArray[np.float64] | None,
    target_sum: float,
    total_is_logged: bool,
    target: str,
    target_number: float,
    single: bool,
) -> ReadDepthResult:
    """scFoundation's tokens of a CSR block of values from 0.

    column_position: each column's position, -1 for none; columns of one position are summed. values: "per_total"
    (ln(1 + x / total * 10^4)), "per_median" (ln(1 + x / (total / target_sum))) or "given". total: the sum of the
    "inputs" or "outputs" over the positions, or "listed" in ``totals``. S is log10(total), or the total itself without
    total_is_logged; T the target_number ("fixed"), log10(total * it) ("times"), log10(total) + it ("plus") or S
    ("same"). single: quotients and products rounded to float32.
    """

def draw_shares(
    totals: NDArray[np.float64],
    cell_ids: NDArray[np.int64],
    min_total: float,
    probability: float,
    seed: int,
    epoch: int,
) -> NDArray[np.float64]:
    """Share of each cell's counts to keep: Beta(2, 2) with this probability from min_total counts on, else 1."""

def thin_counts(
    indptr: NDArray[np.int64],
    indices: Columns,
    data: Counts,
    cell_ids: NDArray[np.int64],
    shares: NDArray[np.float64],
    seed: int,
    epoch: int,
) -> NDArray[np.float64]:
    """Binomial(x, share of the cell) for every value x of a CSR block; depends on seed, epoch, cell and column."""

class ValueBinsResult:
    @property
    def token_ids(self) -> NDArray[np.int32]:
        """Packed, the prefix included."""
    @property
    def values(self) -> NDArray[np.float32]:
        """Of each token its bin, or its value; prefix_value at the prefix."""
    @property
    def cu_seqlens(self) -> NDArray[np.int64]:
        """num_cells + 1 offsets; a cell without gene tokens has length 0, prefix included."""
    @property
    def num_gene_tokens(self) -> NDArray[np.int32]:
        """Per cell, before cutting to max_tokens, without the prefix."""
    @property
    def mapped_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of the values in columns that have a slot."""
    @property
    def total_counts(self) -> NDArray[np.float64]:
        """Per cell, the sum of all values."""

def value_bins(
    indptr: NDArray[np.int64],
    indices: Columns,
    data: Counts,
    column_slot: NDArray[np.int32],
    slot_token: NDArray[np.int32],
    quantiles: NDArray[np.float64],
    rule: str,
    draws: NDArray[np.float64] | None,
    draw_offsets: NDArray[np.int64] | None,
    kept: str,
    max_tokens: int,
    prefix_token: int,
    prefix_value: float,
    with_zeros: bool,
    seed: int,
    epoch: int,
) -> ValueBinsResult:
    """scGPT's value binning of a CSR block of values from 0, taken as float32.

    column_slot gives each column's slot, -1 for no token; columns of one slot are summed, and a cell's tokens
    come in the order of slots. A cell's non-zero values are cut at their ``quantiles`` (none: they stay as they
    are); rule says which bin a value gets where several edges equal it: "left" the highest, "seeded" any at
    random, "given" by ``draws`` (those of cell c from draw_offsets[c]), the authors' arithmetic. kept: which
    tokens stay within max_tokens, "any" at random or the "largest". max_tokens and prefix_token are -1 for none.
    with_zeros: every slot is a token. Random numbers depend on seed, epoch and what the cell holds only.
    """

def bin_values(
    values: NDArray[np.float32] | NDArray[np.float64],
    offsets: NDArray[np.int64],
    token_ids: NDArray[np.int32] | None,
    quantiles: NDArray[np.float64],
    rule: str,
    draws: NDArray[np.float64] | None,
    seed: int,
    epoch: int,
) -> NDArray[np.int32]:
    """Bins of packed values, cell by cell, by the rules of value_bins; zeros stay 0 and take no draw."""

def value_edges(
    values: NDArray[np.float32] | NDArray[np.float64],
    offsets: NDArray[np.int64],
    quantiles: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int32]]:
    """Each cell's quantile edges (C, quantiles), and how many of them are <= and < each value (0 for zeros)."""

def choose_tokens(
    cu_seqlens: NDArray[np.int32],
    cell_ids: NDArray[np.int64],
    num_chosen: NDArray[np.int32],
    num_spared: int,
    seed: int,
    epoch: int,
    purpose: int,
) -> NDArray[np.uint8]:
    """1 for num_chosen[c] tokens of cell c at random, never one of its first num_spared; else 0."""

def philox4x32(counter: NDArray[np.uint32], key: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Philox4x32-10: four words from a counter of four and a key of two."""

def load_codec_library(library: str, path: str) -> bool: ...
def has_codec_library(library: str) -> bool: ...
def check_chunk(stored: bytes, filters: list[tuple[str, int]], filter_mask: int, size: int) -> str: ...

class StoredArray:
    def __init__(
        self,
        name: str,
        dtype: str,
        num_values: int,
        chunk_values: int,
        paths: list[str],
        file_of_chunk: NDArray[np.int32] | None,
        offsets: NDArray[np.int64],
        sizes: NDArray[np.int64],
        filter_masks: NDArray[np.uint32] | None,
        filters: list[tuple[str, int]],
    ) -> None: ...

class CsrStream:
    def __init__(
        self,
        data: StoredArray,
        indices: StoredArray,
        indptr: NDArray[np.int64],
        num_genes: int,
        threads: int = 0,
        validate: bool = True,
    ) -> None: ...
    def submit(self, rows: NDArray[np.int64]) -> None: ...
    def take(
        self,
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[Any], CsrCheck | None, bool]: ...
    def num_waiting(self) -> int: ...
    def close(self) -> None: ...

class ChunkError(RuntimeError): ...

Tensor3 = NDArray[np.float32] | NDArray[np.int16]
"""(rows, heads, head_dim), the last dimension contiguous; int16 holds the bits of bfloat16."""
Matrix = NDArray[np.float32] | NDArray[np.int16]
Ids = NDArray[np.int32] | NDArray[np.int64]

def varlen_forward(
    q: Tensor3,
    k: Tensor3,
    v: Tensor3,
    out: Tensor3,
    lse: NDArray[np.float32],
    cu_seqlens_q: NDArray[np.int32],
    cu_seqlens_k: NDArray[np.int32],
    num_known: NDArray[np.int32] | None,
    scale: float,
) -> None:
    """Attention inside packed cells; writes out and lse (Tq, H). num_known: scGPT's known/unknown mask."""

def varlen_backward(
    grad_out: Tensor3,
    q: Tensor3,
    k: Tensor3,
    v: Tensor3,
    out: Tensor3,
    lse: NDArray[np.float32],
    dq: Tensor3,
    dk: Tensor3,
    dv: Tensor3,
    cu_seqlens_q: NDArray[np.int32],
    cu_seqlens_k: NDArray[np.int32],
    num_known: NDArray[np.int32] | None,
    scale: float,
) -> None:
    """Its gradients; writes dq, dk and dv."""

def favor_forward(
    q: Tensor3,
    k: Tensor3,
    v: Tensor3,
    projection: NDArray[np.float32],
    out: Tensor3,
    key_max: NDArray[np.float32],
    given_max: bool,
    cu_seqlens: NDArray[np.int32],
    eps: float,
) -> None:
    """FAVOR+ attention inside packed cells; writes out, and key_max (C,) unless it is given."""

def favor_backward(
    grad_out: Tensor3,
    q: Tensor3,
    k: Tensor3,
    v: Tensor3,
    projection: NDArray[np.float32],
    dq: Tensor3,
    dk: Tensor3,
    dv: Tensor3,
    key_max: NDArray[np.float32],
    given_max: bool,
    key_max_grad: NDArray[np.float32],
    cu_seqlens: NDArray[np.int32],
    eps: float,
) -> None:
    """Its gradients; writes dq, dk, dv and key_max_grad (C,)."""

def graph_plan(
    cu_seqlens: NDArray[np.int32],
    token_ids: Ids,
    gene_offsets: NDArray[np.int64],
    gene_columns: NDArray[np.int32],
    is_global: NDArray[np.bool_],
) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64], NDArray[np.int32]]:
    """row_offsets, columns, col_offsets, rows: who sees whom in a pack, by a gene graph."""

def graph_forward(
    q: Tensor3,
    k: Tensor3,
    v: Tensor3,
    out: Tensor3,
    lse: NDArray[np.float32],
    row_offsets: NDArray[np.int64],
    columns: NDArray[np.int32],
    scale: float,
) -> None:
    """Attention along a plan's edges; writes out and lse (T, H)."""

def graph_backward(
    grad_out: Tensor3,
    q: Tensor3,
    k: Tensor3,
    v: Tensor3,
    out: Tensor3,
    lse: NDArray[np.float32],
    dq: Tensor3,
    dk: Tensor3,
    dv: Tensor3,
    row_offsets: NDArray[np.int64],
    columns: NDArray[np.int32],
    col_offsets: NDArray[np.int64],
    rows: NDArray[np.int32],
    scale: float,
) -> None:
    """Its gradients; writes dq, dk and dv."""

def embed_norm_forward(
    ids: list[Ids],
    tables: list[Matrix],
    addend: Matrix | None,
    weight: NDArray[np.float32] | None,
    bias: NDArray[np.float32] | None,
    out: Matrix,
    mean: NDArray[np.float32],
    rstd: NDArray[np.float32],
    eps: float,
) -> None:
    """Sum of embeddings and LayerNorm; writes out, and mean and rstd (T,) where there is a weight."""

def embed_norm_backward(
    grad_out: Matrix,
    ids: list[Ids],
    tables: list[Matrix],
    addend: Matrix | None,
    weight: NDArray[np.float32] | None,
    mean: NDArray[np.float32],
    rstd: NDArray[np.float32],
    grad_tables: list[NDArray[np.float32]],
    grad_addend: Matrix | None,
    grad_weight: NDArray[np.float32] | None,
    grad_bias: NDArray[np.float32] | None,
) -> None:
    """Its gradients; every id's rows are summed in the order of its tokens."""
