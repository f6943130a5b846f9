"""Opening zarr stores (folders, or zip files of them) that nobody vouches for.

zarr trusts a store: a name or a symbolic link may lead anywhere, a missing chunk reads as zeros, consolidated
metadata may be older than what they describe, and a codec may be a pickle. Here every key is checked before
it is read, metadata are always read from where they belong, and a missing chunk of counts is an error. The
values themselves are decoded by zarr-python.
"""

from __future__ import annotations

import json
import os
import stat
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from scfm.data.h5_file import MAX_CHUNK_BYTES, reading
from scfm.errors import FormatError, IntegrityError, InvalidArgumentError, MissingFileError, UnsafeFileError

if TYPE_CHECKING:
    import zarr

__all__ = ["OpenStore", "ZarrStore", "check_blosc", "is_zarr", "missing_chunk"]

_METADATA_NAMES = ("zarr.json", ".zgroup", ".zarray", ".zattrs", ".zmetadata")
_MAX_METADATA_BYTES = 64 << 20
BLOSC_HEADER_BYTES = 16
_Look = tuple[int, int, int]


def is_zarr(path: Path) -> bool:
    """Whether this is the folder of a zarr group or array, or a zip file that holds one at its top."""
    if path.is_dir():
        return any((path / name).is_file() for name in _METADATA_NAMES)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError):
        return False
    return not set(_METADATA_NAMES).isdisjoint(names)


class ZarrStore:
    """A zarr store by path; ``format`` is 2 or 3. Nothing stays open, so a source can be pickled and forked."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        if not Path(path).exists():
            raise MissingFileError("no such file or folder", path=path)
        self._root = os.path.realpath(path)
        self._sizes = None if Path(path).is_dir() else _zip_sizes(self.path)
        self._watched: dict[str, _Look] = {}
        if self._sizes is not None:
            self._watched[""] = _look(self._root)
        self.format: Literal[2, 3] = 3 if self.size_of("zarr.json") is not None else 2
        if self.format == 2 and self.size_of(".zgroup") is None:
            raise FormatError("is not a zarr group: it has neither zarr.json nor .zgroup", path=self.path)

    @property
    def is_folder(self) -> bool:
        return self._sizes is None

    def metadata(self, place: str) -> dict[str, Any] | None:
        """What is written about the node at ``place``: zarr.json, or .zarray or .zgroup with .zattrs.

        ``node_type`` is "array" or "group" and ``attributes`` a dict in either format. None: no such node.
        """
        prefix = f"{place}/" if place else ""
        if self.format == 3:
            found = self._document(f"{prefix}zarr.json")
            node_type = None if found is None else found.get("node_type")
        else:
            found, node_type = self._document(f"{prefix}.zarray"), "array"
            if found is None:
                found, node_type = self._document(f"{prefix}.zgroup"), "group"
            if found is not None:
                found = {**found, "attributes": self._document(f"{prefix}.zattrs") or {}}
        if found is None:
            return None
        attributes = found.get("attributes", {})
        if node_type not in ("array", "group") or not isinstance(attributes, dict):
            raise FormatError(
                "the metadata describe neither an array nor a group", path=self.path, where=place
            )
        return {**found, "node_type": node_type, "attributes": attributes}

    def children(self, place: str) -> list[str]:
        """Names of the nodes directly below a group, in order."""
        if self._sizes is None:
            folder = Path(self._root, *_parts(place, self.path))
            with reading(self.path, place or "/"):
                names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
        else:
            prefix = f"{place}/" if place else ""
            below = (key.removeprefix(prefix) for key in self._sizes if key.startswith(prefix))
            names = sorted({key.split("/")[0] for key in below if "/" in key})
        start = f"{place}/" if place else ""
        return [name for name in names if name[:1] != "." and self.metadata(start + name) is not None]

    def size_of(self, key: str) -> int | None:
        """Bytes stored under a key, None where there is nothing. Raises UnsafeFileError, FormatError."""
        parts = _parts(key, self.path)
        if self._sizes is not None:
            return self._sizes.get(key)
        file = Path(self._root, *parts)
        try:
            status = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise FormatError(f"cannot be looked at: {error}", path=self.path, where=key) from error
        if os.path.commonpath([self._root, os.path.realpath(file)]) != self._root:
            raise UnsafeFileError(
                "is a link that leaves the store",
                path=self.path,
                where=key,
                hint="Copy the file into the store itself.",
            )
        if stat.S_ISDIR(status.st_mode):
            return None
        if not stat.S_ISREG(status.st_mode):
            raise FormatError("is a pipe, socket or device, expected a file", path=self.path, where=key)
        return status.st_size

    def file_of(self, key: str) -> str:
        """The file of a key that ``size_of`` has found; folders only."""
        return str(Path(self._root, *key.split("/")))

    def check_unchanged(self) -> None:
        """Raise IntegrityError if metadata that were read have been written again since."""
        for key, seen in self._watched.items():
            try:
                same = _look(self.file_of(key) if key else self._root) == seen
            except OSError:
                same = False
            if not same:
                raise IntegrityError(
                    "the store changed while it was in use",
                    path=self.path,
                    where=key or None,
                    hint="Read it again from the start once nothing writes to it.",
                )

    @contextmanager
    def opened(self, *, strict: bool = True, blosc: Sequence[str] = ()) -> Iterator[OpenStore]:
        """The store for reading values.

        strict: a missing chunk is an error, else it is noted; blosc: what the keys of chunks begin with that
        are blosc buffers each.
        """
        from zarr.storage import LocalStore, ZipStore

        self.check_unchanged()
        inner: LocalStore | ZipStore
        if self.is_folder:
            inner = LocalStore(self._root, read_only=True)
        else:
            with reading(self.path, "/"):
                inner = ZipStore(Path(self._root), mode="r")
                inner._sync_open()
        try:
            yield OpenStore(self, inner, strict=strict, blosc=tuple(blosc))
        finally:
            inner.close()

    def _document(self, key: str) -> dict[str, Any] | None:
        size = self.size_of(key)
        if size is None:
            return None
        if size > _MAX_METADATA_BYTES:
            raise FormatError(f"metadata of {size:,} bytes", path=self.path, where=key)
        with reading(self.path, key):
            if self._sizes is None:
                self._watched.setdefault(key, _look(self.file_of(key)))
                text = Path(self.file_of(key)).read_bytes()
            else:
                with zipfile.ZipFile(self._root) as archive:
                    text = archive.read(key)
            found = json.loads(text)
        if not isinstance(found, dict):
            raise FormatError("is not a JSON object", path=self.path, where=key)
        return found


class OpenStore:
    """Arrays and groups of an open store, as zarr-python gives them, every access checked."""

    def __init__(self, store: ZarrStore, inner: Any, *, strict: bool, blosc: tuple[str, ...]) -> None:
        self._format = store.format
        self._path = store.path
        self._checked = _checked_store(store, inner, strict=strict, blosc=blosc)
        self.missing: set[str] = self._checked.missing_chunks

    def array(self, place: str) -> zarr.Array[Any]:
        import zarr

        with reading(self._path, place):
            return zarr.open_array(self._checked, path=place, mode="r", zarr_format=self._format)

    def group(self, place: str) -> zarr.Group:
        import zarr

        with reading(self._path, place):
            return zarr.open_group(
                self._checked, path=place, mode="r", zarr_format=self._format, use_consolidated=False
            )


def _checked_store(store: ZarrStore, inner: Any, *, strict: bool, blosc: tuple[str, ...]) -> Any:
    from zarr.storage import WrapperStore

    class CheckedStore(WrapperStore):  # type: ignore[type-arg]
        """Refuses keys that lead outside, and chunks that are missing or absurdly large."""

        missing_chunks: ClassVar[set[str]] = set()

        async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
            size = store.size_of(key)
            if size is not None and size > MAX_CHUNK_BYTES and byte_range is None:
                raise FormatError(
                    f"is a chunk of {size:,} bytes; the limit is {MAX_CHUNK_BYTES:,}",
                    path=store.path,
                    where=key,
                )
            if size is None:
                if key.rpartition("/")[2] in _METADATA_NAMES:
                    return None
                self.missing_chunks.add(key)
                if strict:
                    raise missing_chunk(store.path, key)
                return None
            content: Any = await super().get(key, prototype, byte_range)
            whole = content is not None and byte_range is None
            if whole and key.startswith(blosc) and not key.endswith(_METADATA_NAMES):
                header = content.as_numpy_array()[:BLOSC_HEADER_BYTES].tobytes()
                check_blosc(header, size, path=store.path, where=key)
            return content

        async def get_partial_values(self, prototype: Any, key_ranges: Any) -> list[Any]:
            return [await self.get(key, prototype, byte_range) for key, byte_range in key_ranges]

    return CheckedStore(inner)


def check_blosc(header: bytes, size: int, *, path: str, where: str) -> None:
    """Raise FormatError unless a blosc buffer is as long as its header says: its decoder would read on."""
    claimed = int.from_bytes(header[12:BLOSC_HEADER_BYTES], "little")
    num_bytes = int.from_bytes(header[4:8], "little")
    if len(header) < BLOSC_HEADER_BYTES or claimed != size or num_bytes > MAX_CHUNK_BYTES:
        raise FormatError(
            f"is a blosc chunk of {size:,} bytes; its header says {claimed:,}, holding {num_bytes:,}",
            path=path,
            where=where,
            hint="The store is truncated or damaged: copy it again.",
        )


def missing_chunk(path: str, key: str) -> FormatError:
    return FormatError(
        "this chunk is missing",
        path=path,
        where=key,
        hint="Copy the store again. If its writer left out chunks of zeros, write it again with "
        "zarr.config.set({'array.write_empty_chunks': True}).",
    )


def _parts(key: str, path: str) -> list[str]:
    parts = key.split("/") if key else []
    if any(part in ("", ".", "..") or "\0" in part or os.sep in part for part in parts):
        raise UnsafeFileError(f"a name {key[:100]!r} leads outside the store", path=path)
    return parts


def _look(file: str) -> _Look:
    status = Path(file).stat()
    return status.st_size, status.st_mtime_ns, status.st_ino


def _zip_sizes(path: str) -> dict[str, int]:
    if not stat.S_ISREG(Path(path).stat().st_mode):
        raise InvalidArgumentError("is a pipe, socket or device; expected a folder or a zip file", path=path)
    try:
        with zipfile.ZipFile(path) as archive:
            return {entry.filename: entry.file_size for entry in archive.infolist() if not entry.is_dir()}
    except PermissionError as error:
        raise InvalidArgumentError("permission denied", path=path) from error
    except (OSError, zipfile.BadZipFile, ValueError) as error:
        raise FormatError(f"cannot be opened as a zip file ({error})", path=path) from error
