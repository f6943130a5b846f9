"""Every error and warning that scfm raises, in one place.

An error says what is wrong, where (file, dataset, row, gene or key) and what to do about it. Code can branch
on the class or on ``.code``; people read the message. Each class also derives from the built-in exception a
Python user would expect, so ``except ValueError`` and ``except FileNotFoundError`` keep working.
"""

from __future__ import annotations

from os import PathLike

__all__ = [
    "BadCellError",
    "CheckpointError",
    "ConfigError",
    "FormatError",
    "GeneMappingError",
    "IntegrityError",
    "InvalidArgumentError",
    "MissingDependencyError",
    "MissingFileError",
    "NotCountsError",
    "ResourceError",
    "ScfmError",
    "ScfmWarning",
    "StorageError",
    "UnsafeCheckpointError",
    "UnsafeFileError",
    "VersionError",
]


class ScfmError(Exception):
    """Base of all scfm errors.

    Parameters
    ----------
    message: what was found and what was expected.
    path: the file or folder concerned.
    where: the dataset, row, gene, key or argument inside it.
    hint: the likely remedy, a full sentence.
    """

    code = "scfm_error"

    def __init__(
        self,
        message: str,
        *,
        path: str | PathLike[str] | None = None,
        where: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.message = message
        self.path = None if path is None else str(path)
        self.where = where
        self.hint = hint
        place = ": ".join(part for part in (self.path, where) if part)
        text = f"{place}: {message}" if place else message
        if hint:
            text = f"{text.rstrip('.')}. {hint}"
        super().__init__(text)


class InvalidArgumentError(ScfmError, ValueError):
    """An argument has a value that the function cannot take."""

    code = "invalid_argument"


class MissingFileError(ScfmError, FileNotFoundError):
    """A file or folder that is needed is not there."""

    code = "missing_file"


class MissingDependencyError(ScfmError, ImportError):
    """An optional package is needed for this and is not installed."""

    code = "missing_dependency"


class FormatError(ScfmError, ValueError):
    """A file is truncated, malformed or not what its name says."""

    code = "format"


class UnsafeFileError(FormatError):
    """A data file points outside itself (external links or storage, virtual datasets)."""

    code = "unsafe_file"


class NotCountsError(FormatError):
    """A model that needs raw counts was given something else."""

    code = "not_counts"


class BadCellError(ScfmError, ValueError):
    """A cell has impossible counts (NaN, infinite, negative) or no gene that the model knows."""

    code = "bad_cell"


class GeneMappingError(ScfmError, ValueError):
    """The genes of a data set cannot be matched to the model's vocabulary."""

    code = "gene_mapping"


class ConfigError(ScfmError, ValueError):
    """A configuration value is missing, unknown, contradictory or out of bounds."""

    code = "config"


class CheckpointError(ScfmError, ValueError):
    """Weights do not fit the model: keys missing or left over, wrong shape, dtype or vocabulary."""

    code = "checkpoint"


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint or dictionary would run code, or reach outside its folder, when read."""

    code = "unsafe_checkpoint"


class VersionError(ScfmError, ValueError):
    """A file was written by a newer scfm, or by a model family this version does not know."""

    code = "version"


class IntegrityError(ScfmError, ValueError):
    """A checksum, fingerprint or pinned revision does not match."""

    code = "integrity"


class ResourceError(ScfmError, MemoryError):
    """Memory or another resource would not suffice; said before it runs out where possible."""

    code = "resource"


class StorageError(ScfmError, OSError):
    """The disk did not take what was written: it is full, read-only, over quota or failing. ``.errno`` says."""

    code = "storage"


class ScfmWarning(UserWarning):
    """Something was repaired, left out or guessed; the message counts the cases."""
