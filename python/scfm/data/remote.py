"""Reading .h5ad files over the network: h5py on a file object of fsspec.

Blocks are fetched as they are needed and cached by fsspec; the native reader needs a local file, so this is
for a look or a small set. For a whole atlas, download it first.
"""

from __future__ import annotations

import h5py

from scfm.data.h5_file import Hdf5File, reading
from scfm.data.h5ad import h5ad_source
from scfm.data.source import CellSource
from scfm.errors import FormatError, MissingDependencyError, MissingFileError

__all__ = ["open_remote_h5ad"]


def open_remote_h5ad(url: str, *, layer: str | None = None, assume_counts: bool = False) -> CellSource:
    """The cells of the .h5ad file at ``url``, raw counts. The connection stays open; it cannot be pickled.

    Raises MissingDependencyError without fsspec or the package for this kind of URL, MissingFileError,
    FormatError and what ``open_h5ad`` raises.
    """
    handle = _open(url)
    try:
        source = h5ad_source(Hdf5File(url, handle=handle), layer=layer, assume_counts=assume_counts)
    except BaseException:
        handle.close()
        raise
    source.reader = "h5py (remote)"
    return source


def _open(url: str) -> h5py.File:
    scheme = url.partition("://")[0]
    try:
        import fsspec

        remote = fsspec.open(url, "rb").open()
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {scheme}:// needs another package ({error})",
            path=url,
            hint="Install it with pip install scfm[remote].",
        ) from error
    except FileNotFoundError as error:
        raise MissingFileError("no such file", path=url) from error
    except (ValueError, OSError) as error:
        raise FormatError(f"cannot be opened ({type(error).__name__}: {error})", path=url) from error
    with reading(url, "/"):
        return h5py.File(remote, "r")
