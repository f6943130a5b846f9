"""A pretraining corpus: cells of any number of files, read when they are needed and never all at once.

Known beforehand is what planning needs: the tokenizer, which cells are held out, and how many positions of a model each
training cell takes, found by tokenizing every cell once (2 or 4 bytes a cell). Cells are counted through all sources;
masks and all other draws are keyed by these numbers. Cells without tokens have length 0 and are in no plan.
"""

from __future__ import annotations

import hashlib
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from scfm import __version__, _native
from scfm.data.packed import PackedCells, concatenate
from scfm.data.source import CellSource
from scfm.data.source_list import SourceList
from scfm.data.windows import Piece, Window, read_windows
from scfm.errors import ConfigError, IntegrityError, ScfmWarning
from scfm.train.config import PretrainConfig
from scfm.train.corpus.budget_advice import better_budget
from scfm.train.corpus.cells import open_cells, sample_cells
from scfm.train.corpus.coexpression import MOST_CELLS, coexpression_vectors, counts_by_token
from scfm.train.corpus.folder import CorpusFolder, file_stamps
from scfm.train.corpus.lengths import LengthsOf, differences, fingerprint_of, measure_cells
from scfm.train.corpus.microbatch_plan import MicrobatchPlan, expect_cells_fit
from scfm.train.corpus.vocabulary import (
    Vocabulary,
    build_dictionaries,
    given_vocabulary,
    made_vocabulary,
    read_vocabulary,
    tokenizer_of,
    vocabulary_text,
)

__all__ = ["Corpus", "LengthsOf", "build_dictionaries", "read_corpus"]

Watch = Callable[[], None]

_FOLDER = "corpus"
_VOCABULARY = "vocabulary"
_LENGTHS = "lengths.npy"
_COEXPRESSION = "coexpression.npy"
_CELLS_AT_ONCE = 1024


def read_corpus(config: PretrainConfig, *, rank: int = 0, watch: Watch = lambda: None) -> Corpus:
    """The corpus of ``config.data`` with its tokenizer; the cells' lengths are found by ``measure``.

    A vocabulary that must be made is made by rank 0 and read by the others from ``config.out``. watch: called now and
    then, so that a run can tell a long pass from one that hangs. Raises ConfigError for settings that do not fit the
    data, the readers' errors for data.
    """
    cells, held_out = open_cells(
        config.data,
        layer=config.layer,
        folder=config.data_folder,
        held_out_fraction=config.held_out_fraction,
        seed=config.seed,
    )
    if held_out.all():
        raise ConfigError(f"no cell is left to train on of {len(cells):,}", where="data")
    folder = CorpusFolder(Path(config.out) / _FOLDER, rank=rank, patience=config.timeout_seconds, watch=watch)
    stamps = file_stamps(cells.parts)
    vocab = given_vocabulary(config)
    is_made = vocab is None
    if vocab is None:
        vocab = _made_vocabulary(config, cells, held_out, folder, stamps)
    return Corpus(config, cells, held_out, tokenizer_of(config, vocab, is_made=is_made), folder, stamps)


def _made_vocabulary(
    config: PretrainConfig,
    cells: SourceList,
    held_out: NDArray[np.bool_],
    folder: CorpusFolder,
    stamps: list[dict[str, Any]] | None,
) -> Vocabulary:
    ends = np.cumsum([len(part) for part in cells.parts])
    made: list[Vocabulary] = []

    def make() -> tuple[dict[str, Any], Callable[[Path], None]]:
        vocab = made_vocabulary(config, cells.parts, np.split(held_out, ends[:-1]), folder.sign)
        made.append(vocab)
        text = vocabulary_text(vocab)
        return {}, lambda path: _save_text(path, text)

    key = None
    if stamps is not None:
        key = _cells_key(held_out, stamps)
        key |= {name: getattr(config, name) for name in ("family", "species", "special_tokens")}
    # Where other data may follow in a run, its model keeps the tokens that it has.
    if not ("data" in config.allow_change and folder.found(_VOCABULARY, None) is not None):
        folder.made(_VOCABULARY, key, make)
    return made[0] if made else read_vocabulary(config.family, folder.path / _VOCABULARY)


class Corpus:
    """The cells of a run: ``Corpus.read`` (or ``read_corpus``), then ``measure``.

    cells: all of them, as one list; parts: its sources; tokenizer: the family's; held_out: bool (cells,).
    After ``measure``: lengths (cells,), uint16 or uint32, of training cells, else 0; num_training, num_tokens
    (positions of an epoch), num_without_tokens (training cells that were left out), fingerprint.
    """

    def __init__(
        self,
        config: PretrainConfig,
        cells: SourceList,
        held_out: NDArray[np.bool_],
        tokenizer: Any,
        folder: CorpusFolder,
        stamps: list[dict[str, Any]] | None,
    ) -> None:
        self.config = config
        self.cells = cells
        self.held_out = held_out
        self.tokenizer = tokenizer
        self._folder = folder
        self._stamps = stamps
        self._facts: dict[str, Any] | None = None
        self._lengths: NDArray[np.unsignedinteger] | None = None
        self._plans: dict[int, Any] | None = None

    @classmethod
    def read(cls, config: PretrainConfig, *, rank: int = 0, watch: Watch = lambda: None) -> Corpus:
        """``read_corpus``."""
        return read_corpus(config, rank=rank, watch=watch)

    def __len__(self) -> int:
        return len(self.cells)

    @property
    def parts(self) -> list[CellSource]:
        return self.cells.parts

    @property
    def lengths(self) -> NDArray[np.unsignedinteger]:
        assert self._lengths is not None, "Corpus.measure(objective.lengths_of) comes first"
        return self._lengths

    @property
    def num_training(self) -> int:
        """Cells of an epoch."""
        return int(self._measured["num_training"])

    @property
    def num_tokens(self) -> int:
        """Positions that an epoch computes."""
        return int(self._measured["num_tokens"])

    @property
    def num_without_tokens(self) -> int:
        """Cells that would be trained on and have no token, or are filtered out."""
        return int(self._measured["num_without_tokens"])

    @property
    def num_held_out(self) -> int:
        return int(self.held_out.sum())

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What the training cells are, for a checkpoint: each file with its shape and a checksum of its tokens."""
        found: dict[str, Any] = self._measured["fingerprint"]
        return found

    @property
    def _measured(self) -> dict[str, Any]:
        assert self._facts is not None, "Corpus.measure(objective.lengths_of) comes first"
        return self._facts

    # ---- lengths --------------------------------------------------------------------------------------------------

    def measure(self, lengths_of: LengthsOf) -> None:
        """Find the length of every training cell, in one pass over the data or in the run's folder.

        lengths_of: the objective's, int64 (C,) of a pack, 0 for cells that cannot be trained on. Rank 0 makes the pass
        and writes; the others wait and read. Raises ConfigError when nothing is left to train on or a cell is longer
        than the token budget.
        """
        made: list[NDArray[np.unsignedinteger]] = []

        def make() -> tuple[dict[str, Any], Callable[[Path], None]]:
            lengths, facts = self._measure(lengths_of)
            made.append(lengths)
            self._facts = facts
            return facts, lambda path: _save_array(path, lengths)

        facts = self._folder.made(_LENGTHS, self._lengths_key(), make)
        self._facts = facts if facts is not None else self._facts
        # Mapped, so that the ranks of a machine share one copy.
        self._lengths = made[0] if made else _mapped_array(self._folder.path / _LENGTHS)
        if not self.num_training:
            raise ConfigError(f"no cell is left to train on of {len(self):,}", where="data")
        expect_cells_fit(self.lengths, self.config.token_budget, self.row_label)
        if made:
            self._advise()

    def _advise(self) -> None:
        """Warn of a token budget that these cells cannot fill."""
        found = better_budget(self.lengths[self.lengths > 0], self.config.token_budget)
        if found is not None:
            unused, better, left = found
            warnings.warn(
                f"token_budget = {self.config.token_budget:,} leaves {unused:.1%} of each microbatch unused, because "
                f"of the cells' lengths; token_budget = {better:,} would leave {left:.1%}",
                ScfmWarning,
                stacklevel=3,
            )

    def _measure(self, lengths_of: LengthsOf) -> tuple[NDArray[np.unsignedinteger], dict[str, Any]]:
        lengths, checksums = measure_cells(self.tokenizer, self.cells, lengths_of, self._folder.sign)
        lengths[self.held_out] = 0
        if not lengths.size or lengths.max() <= np.iinfo(np.uint16).max:
            lengths = lengths.astype(np.uint16)
        num_training = int(np.count_nonzero(lengths))
        return lengths, {
            "num_training": num_training,
            "num_tokens": int(lengths.sum(dtype=np.int64)),
            "num_without_tokens": len(self) - self.num_held_out - num_training,
            "fingerprint": fingerprint_of(self.parts, lengths, checksums, self._vocabulary_sha256),
        }

    @cached_property
    def _vocabulary_sha256(self) -> str:
        return hashlib.sha256(vocabulary_text(self.tokenizer.vocab).encode()).hexdigest()

    def _lengths_key(self) -> dict[str, Any] | None:
        if self._stamps is None:
            return None
        tokenizer = self.tokenizer.describe()
        # The vocabulary itself counts, not where it lies.
        for name in ("dictionaries", "vocab"):
            tokenizer.pop(name, None)
        return _cells_key(self.held_out, self._stamps) | {
            "tokenizer": tokenizer,
            "vocabulary_sha256": self._vocabulary_sha256,
            "model": self.config.model_fields(),
            "objective": self.config.objective,
            "family": self.config.family,
        }

    # ---- cells ----------------------------------------------------------------------------------------------------

    def plan(self, epoch: int) -> MicrobatchPlan:
        """The microbatches of an epoch."""
        return MicrobatchPlan(
            self.lengths,
            [len(part) for part in self.parts],
            seed=self.config.seed,
            epoch=epoch,
            token_budget=self.config.token_budget,
            block_size=self.config.shuffle_block,
            window=self.config.shuffle_window,
            row_label=self.row_label,
        )

    def row_label(self, cell: int) -> str:
        """How messages name a cell: its row and file."""
        return f"row {self.cells.row_labels(np.array([cell]))[0]}"

    def obs_column(self, name: str) -> pd.Series | None:
        """A column of obs of all cells, NaN in files without it; None where none has it."""
        return self.cells.obs_column(name)

    def tokens(
        self,
        cells: NDArray[np.int64],
        pieces: list[Piece],
        *,
        epoch: int,
        expect: LengthsOf | None = None,
    ) -> PackedCells:
        """Tokens of cells that were read; ``cell_ids`` count through the corpus.

        expect: tells lengths, which must be those that were planned with; raises IntegrityError naming the cell if a
        file was changed since.
        """
        if self._plans is None:
            self._plans = self.tokenizer.plan_parts(self.cells, self.tokenizer.species)
        packed: PackedCells = self.tokenizer.tokenize_window(Window(0, cells, pieces), self._plans, epoch)
        if expect is not None:
            self._expect_lengths(cells, packed, expect(packed).numpy())
        return packed

    def _expect_lengths(
        self, cells: NDArray[np.int64], packed: PackedCells, found: NDArray[np.int64]
    ) -> None:
        ids = packed.cell_ids.numpy()
        missing = np.setdiff1d(cells, ids) if len(ids) < len(cells) else ids[:0]
        wrong = np.concatenate([missing, ids[found != self.lengths[ids]]])
        if len(wrong):
            raise IntegrityError(
                f"has another number of tokens than when the run was planned ({len(wrong):,} such cells)",
                where=self.row_label(int(wrong[0])),
                hint="A data file was changed while it was trained on. Put it back, or start a new run.",
            )

    def packs_of(self, cells: NDArray[np.int64], *, epoch: int = 0) -> Iterator[PackedCells]:
        """Tokens of any cells, in this order, a thousand at a time; those without tokens are left out."""
        plan = _TheseCells(cells)
        with closing(read_windows(self.parts, plan)) as windows:
            for number, pieces in windows:
                yield self.tokens(plan.joined(number), pieces, epoch=epoch)

    def held_out_packs(self) -> Iterator[PackedCells]:
        """Tokens of all held-out cells, a thousand at a time, in the corpus's order."""
        return self.packs_of(np.flatnonzero(self.held_out))

    def held_out_pack(self, most_cells: int) -> PackedCells:
        """Tokens of at most so many held-out cells, chosen by (seed, cell), in the corpus's order."""
        return concatenate(list(self.packs_of(self._sample(self.held_out, most_cells))))

    def training_pack(self, most_cells: int) -> PackedCells:
        """Tokens of at most so many training cells, chosen by (seed, cell), in the corpus's order."""
        return concatenate(list(self.packs_of(self._sample(self.lengths > 0, most_cells))))

    def _sample(self, eligible: NDArray[np.bool_], most_cells: int) -> NDArray[np.int64]:
        return sample_cells(eligible, most_cells, self.config.seed)

    def coexpression(self, num_components: int) -> NDArray[np.float32]:
        """Vectors of the genes by token id, float32 (vocabulary, num_components); see coexpression.py.

        Worked out by rank 0 and read by the others, so that all begin from the same. Raises ConfigError.
        """
        made: list[NDArray[np.float32]] = []

        def make() -> tuple[dict[str, Any], Callable[[Path], None]]:
            counts, library_size = self._training_counts(MOST_CELLS)
            seed = self.config.seed
            vectors = coexpression_vectors(counts, library_size, num_components, seed=seed)
            made.append(vectors)
            return {}, lambda path: _save_array(path, vectors)

        key = None
        if self._stamps is not None:
            settings: dict[str, Any] = {"num_components": num_components, "seed": self.config.seed}
            settings["vocabulary_sha256"] = self._vocabulary_sha256
            key = _cells_key(self.held_out, self._stamps) | settings
        self._folder.made(_COEXPRESSION, key, make)
        if made:
            return made[0]
        found: NDArray[np.float32] = np.load(self._folder.path / _COEXPRESSION, allow_pickle=False)
        return found

    def _training_counts(self, most_cells: int) -> tuple[sparse.csr_matrix, NDArray[np.float64]]:
        """Raw counts by token id of at most so many training cells with counts, and their library sizes."""
        num_tokens = max(self.tokenizer.vocab.token.values()) + 1
        column_tokens = [
            self.tokenizer.column_tokens(part.genes) if len(part) else None for part in self.parts
        ]
        blocks, sizes = [], []
        plan = _TheseCells(self._sample(~self.held_out, most_cells))
        with closing(read_windows(self.parts, plan)) as windows:
            for _, pieces in windows:
                for piece in pieces:
                    tokens = column_tokens[piece.part]
                    assert tokens is not None
                    blocks.append(counts_by_token(piece.block, tokens, num_tokens))
                    sizes.append(_native.row_sums(piece.block.indptr, piece.block.data))
                self._folder.sign()
        counts, library_size = sparse.vstack(blocks, format="csr"), np.concatenate(sizes)
        has_counts = library_size > 0
        return counts[has_counts], library_size[has_counts]

    def differences(self, fingerprint: dict[str, Any]) -> list[str]:
        """How an earlier run's fingerprint differs from this corpus, a sentence each; none if it does not.

        Where files lie and how they are compressed makes no difference: cells and tokens do.
        """
        return differences(fingerprint, self.fingerprint)


@dataclass(frozen=True)
class _TheseCells:
    """Given cells as a plan of windows; see scfm.data.windows.WindowPlan."""

    cells: NDArray[np.int64]

    @property
    def numbers(self) -> Sequence[int]:
        return range(-(-len(self.cells) // _CELLS_AT_ONCE))

    def joined(self, number: int) -> NDArray[np.int64]:
        return self.cells[number * _CELLS_AT_ONCE : (number + 1) * _CELLS_AT_ONCE]

    def touching(self, part: int) -> Sequence[int]:
        return self.numbers


def _cells_key(held_out: NDArray[np.bool_], stamps: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "scfm": __version__,
        "files": stamps,
        "held_out_crc32": zlib.crc32(np.packbits(held_out).tobytes()),
    }


def _save_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _mapped_array(path: Path) -> NDArray[Any]:
    mapped: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return mapped.view(np.ndarray)


def _save_array(path: Path, array: NDArray[Any]) -> None:
    with path.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
