"""Which number types a count matrix may have, and how each becomes one the engine reads.

Files in the wild hold counts as anything from bool to big-endian float64, and column indices as anything from
uint8 to float32. Every conversion here is lossless; a type that cannot be converted without loss is an error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scfm.errors import FormatError

__all__ = ["Array", "plain_indices", "plain_values"]

Array = NDArray[Any]

_NATIVE_VALUES = ("f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


def check_value_type(dtype: np.dtype[Any], *, name: str, dataset: str) -> None:
    """Raise FormatError unless ``dtype`` is a real number type (bool included)."""
    if dtype.fields is not None or dtype.kind not in "biuf" or dtype.itemsize > 8:
        raise FormatError(
            f"counts have type {dtype}, expected integers or floats of at most 64 bits",
            path=name,
            where=dataset,
        )


def plain_values(values: Array, *, name: str, dataset: str) -> Array:
    """Counts as a contiguous array of a native type: float32/64 or (unsigned) integers of 8 to 64 bits.

    bool becomes uint8, float16 float32, big-endian little-endian. Raises FormatError for anything else.
    """
    check_value_type(values.dtype, name=name, dataset=dataset)
    if values.dtype == np.bool_:
        return np.ascontiguousarray(values).view(np.uint8)
    if values.dtype.kind == "f" and values.dtype.itemsize == 2:
        return np.ascontiguousarray(values, dtype=np.float32)
    code = f"{values.dtype.kind}{values.dtype.itemsize}"
    assert code in _NATIVE_VALUES
    return np.ascontiguousarray(values, dtype=np.dtype(code))


def plain_indices(indices: Array, *, name: str, dataset: str) -> NDArray[np.int32] | NDArray[np.int64]:
    """Column indices or row pointers as contiguous int32 or int64, widened when that loses nothing.

    Raises FormatError for text, records, NaN, fractions and numbers beyond 2^63.
    """
    dtype = indices.dtype
    if dtype.fields is not None or dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise FormatError(f"indices have type {dtype}, expected integers", path=name, where=dataset)
    if dtype.kind == "f":
        return _from_floats(indices, name=name, dataset=dataset)
    if dtype.kind == "u" and dtype.itemsize == 8:
        if indices.size and int(indices.max()) > np.iinfo(np.int64).max:
            position = int(indices.argmax())
            raise FormatError(
                f"index {int(indices[position])} at position {position} is beyond 2^63",
                path=name,
                where=dataset,
            )
        return np.ascontiguousarray(indices, dtype=np.int64)
    if dtype.itemsize == 8 or (dtype.kind == "u" and dtype.itemsize == 4):
        return np.ascontiguousarray(indices, dtype=np.int64)
    return np.ascontiguousarray(indices, dtype=np.int32)


def _from_floats(indices: Array, *, name: str, dataset: str) -> NDArray[np.int64]:
    with np.errstate(invalid="ignore"):
        exact = (np.trunc(indices) == indices) & (np.abs(indices) < 2.0**63)
    if not exact.all():
        position = int(np.flatnonzero(~exact)[0])
        raise FormatError(
            f"index {indices[position]!s} at position {position} is not a whole number",
            path=name,
            where=dataset,
        )
    return np.ascontiguousarray(indices, dtype=np.int64)
