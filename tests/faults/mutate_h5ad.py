"""A registry of malformed and unusual .h5ad files: each entry damages a small good file in one way.

``mutated(name, folder)`` writes the file; ``MUTATIONS[name]`` says what a reader must do with it: the
error's class and words of its message, or "same" when the counts must come out unharmed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

NUM_CELLS, NUM_GENES = 12, 20


@dataclass(frozen=True)
class Mutation:
    """expect: "same" or an error class; words: what its message must contain."""

    apply: Callable[[h5py.File, Path], None]
    expect: str
    words: tuple[str, ...] = ()
    compression: str | None = None


MUTATIONS: dict[str, Mutation] = {}


def mutation(
    expect: str, *words: str, compression: str | None = None
) -> Callable[[Callable[[h5py.File, Path], None]], Callable[[h5py.File, Path], None]]:
    def register(apply: Callable[[h5py.File, Path], None]) -> Callable[[h5py.File, Path], None]:
        MUTATIONS[apply.__name__] = Mutation(apply, expect, words, compression)
        return apply

    return register


def good_counts() -> np.ndarray:
    """Float32 counts, cells x genes; every cell expresses at least three genes."""
    counts = np.random.default_rng(7).poisson(0.6, (NUM_CELLS, NUM_GENES)).astype(np.float32)
    counts[:, [2, 5, 11]] += 1
    return counts


def good_anndata() -> anndata.AnnData:
    obs = pd.DataFrame(
        {"kind": pd.Categorical(["a", "b", "c"] * 4), "n_counts": good_counts().sum(1)},
        index=[f"cell{i}" for i in range(NUM_CELLS)],
    )
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{i:011d}" for i in range(NUM_GENES)]},
        index=[f"GENE{i}" for i in range(NUM_GENES)],
    )
    return anndata.AnnData(sparse.csr_matrix(good_counts()), obs=obs, var=var)


def mutated(name: str, folder: Path) -> Path:
    entry = MUTATIONS[name]
    path = folder / f"{name}.h5ad"
    good_anndata().write_h5ad(path, compression=entry.compression)
    with h5py.File(path, "r+") as file:
        entry.apply(file, folder)
    return path


def replace(file: h5py.File, place: str, values: np.ndarray, **options: object) -> None:
    del file[place]
    file.create_dataset(place, data=values, **options)


# --- row pointers ---


@mutation("FormatError", "indptr", "row 3")
def indptr_decreasing(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][4] = file["X/indptr"][3] - 1


@mutation("FormatError", "indptr", "row 0")
def indptr_starts_late(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][0] = 2


@mutation("FormatError", "indptr")
def indptr_negative(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][0] = -5


@mutation("FormatError", "indptr", "values are stored")
def indptr_ends_beyond(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][-1] += 1000


@mutation("FormatError", "indptr", "values are stored")
def indptr_ends_early(file: h5py.File, folder: Path) -> None:
    file["X/indptr"][-1] -= 1


@mutation("FormatError", "indptr", "13")
def indptr_too_short(file: h5py.File, folder: Path) -> None:
    replace(file, "X/indptr", file["X/indptr"][:-1])


@mutation("FormatError", "indptr", "13")
def indptr_too_long(file: h5py.File, folder: Path) -> None:
    pointers = file["X/indptr"][()]
    replace(file, "X/indptr", np.append(pointers, pointers[-1]))


@mutation("FormatError", "indptr", "13")
def indptr_empty(file: h5py.File, folder: Path) -> None:
    replace(file, "X/indptr", np.empty(0, np.int32))


@mutation("FormatError", "indptr")
def indptr_overflow(file: h5py.File, folder: Path) -> None:
    pointers = file["X/indptr"][()].astype(np.int64)
    pointers[5], pointers[6] = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    replace(file, "X/indptr", pointers)


@mutation("same")
def indptr_int64(file: h5py.File, folder: Path) -> None:
    replace(file, "X/indptr", file["X/indptr"][()].astype(np.int64))


# --- column indices ---


@mutation("FormatError", "row 7", "1000000")
def index_too_large(file: h5py.File, folder: Path) -> None:
    file["X/indices"][file["X/indptr"][7]] = 1_000_000


@mutation("FormatError", "row 7", "20")
def index_one_too_large(file: h5py.File, folder: Path) -> None:
    file["X/indices"][file["X/indptr"][8] - 1] = NUM_GENES


@mutation("FormatError", "row 7", "-1")
def index_negative(file: h5py.File, folder: Path) -> None:
    file["X/indices"][file["X/indptr"][7]] = -1


@mutation("FormatError", "row 7")
def index_near_2_31(file: h5py.File, folder: Path) -> None:
    file["X/indices"][file["X/indptr"][7]] = 2**31 - 1


@mutation("FormatError", "row 7")
def index_beyond_int32(file: h5py.File, folder: Path) -> None:
    columns = file["X/indices"][()].astype(np.int64)
    columns[file["X/indptr"][7]] = 2**32 + 1
    replace(file, "X/indices", columns)


@mutation("FormatError", "indices", "whole")
def indices_fractional(file: h5py.File, folder: Path) -> None:
    replace(file, "X/indices", file["X/indices"][()].astype(np.float32) + 0.5)


@mutation("FormatError", "indices", "whole")
def indices_nan(file: h5py.File, folder: Path) -> None:
    columns = file["X/indices"][()].astype(np.float64)
    columns[3] = np.nan
    replace(file, "X/indices", columns)


@mutation("FormatError", "indices", "2^63")
def indices_uint64_huge(file: h5py.File, folder: Path) -> None:
    columns = file["X/indices"][()].astype(np.uint64)
    columns[3] = 2**64 - 1
    replace(file, "X/indices", columns)


@mutation("FormatError", "indices")
def indices_text(file: h5py.File, folder: Path) -> None:
    replace(file, "X/indices", np.array([str(i) for i in file["X/indices"][()]], dtype="S4"))


def _register_index_types() -> None:
    for name in (
        "float32",
        "float64",
        "uint64",
        "int64",
        "uint32",
        "int16",
        "uint16",
        "int8",
        "uint8",
        ">i4",
    ):

        def convert(file: h5py.File, folder: Path, name: str = name) -> None:
            replace(file, "X/indices", file["X/indices"][()].astype(name))

        convert.__name__ = f"indices_{name.replace('>', 'big_endian_')}"
        mutation("same")(convert)


_register_index_types()


@mutation("same")
def rows_unsorted(file: h5py.File, folder: Path) -> None:
    matrix = sparse.csr_matrix(good_counts())
    for start, stop in zip(matrix.indptr[:-1], matrix.indptr[1:], strict=True):
        matrix.indices[start:stop] = matrix.indices[start:stop][::-1].copy()
        matrix.data[start:stop] = matrix.data[start:stop][::-1].copy()
    file["X/indices"][()] = matrix.indices
    file["X/data"][()] = matrix.data


# --- values ---


@mutation("FormatError", "in data")
def data_shorter(file: h5py.File, folder: Path) -> None:
    replace(file, "X/data", file["X/data"][:-3])


@mutation("FormatError", "in data")
def data_longer(file: h5py.File, folder: Path) -> None:
    replace(file, "X/data", np.append(file["X/data"][()], [1, 2]).astype(np.float32))


@mutation("FormatError", "X/data", "dimension")
def data_two_dimensional(file: h5py.File, folder: Path) -> None:
    replace(file, "X/data", file["X/data"][()][:, None])


@mutation("FormatError", "X/data")
def data_missing(file: h5py.File, folder: Path) -> None:
    del file["X/data"]


@mutation("FormatError", "X/data")
def data_is_group(file: h5py.File, folder: Path) -> None:
    del file["X/data"]
    file.create_group("X/data")


@mutation("FormatError", "type")
def data_text(file: h5py.File, folder: Path) -> None:
    replace(file, "X/data", np.array([str(v) for v in file["X/data"][()]], dtype="S6"))


@mutation("FormatError", "type")
def data_vlen_text(file: h5py.File, folder: Path) -> None:
    values = np.array([str(v) for v in file["X/data"][()]], dtype=object)
    replace(file, "X/data", values, dtype=h5py.string_dtype())


@mutation("FormatError", "type")
def data_complex(file: h5py.File, folder: Path) -> None:
    replace(file, "X/data", file["X/data"][()].astype(np.complex64))


@mutation("FormatError", "type")
def data_compound(file: h5py.File, folder: Path) -> None:
    values = np.zeros(file["X/data"].shape, dtype=[("a", "f4"), ("b", "i4")])
    replace(file, "X/data", values)


def _register_value_types() -> None:
    for name in (">f4", ">f8", ">i4", "f2", "f8", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"):

        def convert(file: h5py.File, folder: Path, name: str = name) -> None:
            replace(file, "X/data", file["X/data"][()].astype(name))

        convert.__name__ = f"data_{name.replace('>', 'big_endian_')}"
        mutation("same")(convert)


_register_value_types()


def _register_bad_values() -> None:
    for name, value, word in (
        ("nan", np.nan, "finite"),
        ("inf", np.inf, "finite"),
        ("minus_inf", -np.inf, "finite"),
        ("negative", -3, "negative"),
    ):

        def spoil(file: h5py.File, folder: Path, value: float = value) -> None:
            start = int(file["X/indptr"][9])
            columns = file["X/indices"][start : int(file["X/indptr"][10])].tolist()
            file["X/data"][start + columns.index(11)] = value

        spoil.__name__ = f"value_{name}"
        mutation("BadCellError", "row 9", "GENE11", word)(spoil)


_register_bad_values()


@mutation("FormatError", "X/", compression="gzip")
def gzip_chunk_corrupt(file: h5py.File, folder: Path) -> None:
    dataset = file["X/indices"]
    chunk = dataset.id.get_chunk_info(0)
    file.flush()
    with open(file.filename, "r+b") as raw:
        raw.seek(chunk.byte_offset + chunk.size // 2)
        raw.write(b"\xff\x00\xff\x00\xff\x00")


# --- shapes ---


@mutation("FormatError", "shape", "(11, 20)")
def shape_smaller(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["shape"] = np.array([NUM_CELLS - 1, NUM_GENES])


@mutation("FormatError", "shape", "(12, 30)")
def shape_larger(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["shape"] = np.array([NUM_CELLS, NUM_GENES + 10])


@mutation("FormatError", "shape")
def shape_huge(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["shape"] = np.array([2**40, 2**40])


@mutation("FormatError", "shape")
def shape_negative(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["shape"] = np.array([-1, NUM_GENES])


@mutation("FormatError", "X")
def shape_text(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["shape"] = "12 x 20"


@mutation("same")
def shape_missing(file: h5py.File, folder: Path) -> None:
    del file["X"].attrs["shape"]


@mutation("FormatError", "shape")
def obs_shorter(file: h5py.File, folder: Path) -> None:
    replace(file, "obs/_index", file["obs/_index"][:-2])


@mutation("FormatError", "shape")
def var_longer(file: h5py.File, folder: Path) -> None:
    names = np.append(file["var/_index"][()], [b"EXTRA"])
    replace(file, "var/_index", names, dtype=h5py.string_dtype())


@mutation("FormatError", "shape")
def dense_wrong_shape(file: h5py.File, folder: Path) -> None:
    replace(file, "X", good_counts().T)


@mutation("FormatError", "shape")
def dense_one_dimensional(file: h5py.File, folder: Path) -> None:
    replace(file, "X", good_counts()[:, 0])


# --- objects missing or of another kind ---


@mutation("FormatError", "X")
def x_missing(file: h5py.File, folder: Path) -> None:
    del file["X"]


@mutation("FormatError", "obs")
def obs_missing(file: h5py.File, folder: Path) -> None:
    del file["obs"]


@mutation("FormatError", "obs", "index")
def obs_index_missing(file: h5py.File, folder: Path) -> None:
    del file["obs/_index"]


@mutation("FormatError", "coo_matrix")
def unknown_encoding(file: h5py.File, folder: Path) -> None:
    file["X"].attrs["encoding-type"] = "coo_matrix"


@mutation("FormatError", "obs")
def category_code_out_of_range(file: h5py.File, folder: Path) -> None:
    file["obs/kind/codes"][3] = 99


@mutation("FormatError", "obs")
def obs_column_shorter(file: h5py.File, folder: Path) -> None:
    replace(file, "obs/n_counts", file["obs/n_counts"][:-1])
    file["obs/n_counts"].attrs["encoding-type"] = "array"
    file["obs/n_counts"].attrs["encoding-version"] = "0.2.0"


@mutation("same")
def legacy_sparse_attributes(file: h5py.File, folder: Path) -> None:
    """anndata before 0.7."""
    attributes = file["X"].attrs
    attributes["h5sparse_format"], attributes["h5sparse_shape"] = "csr", attributes["shape"]
    for name in ("encoding-type", "encoding-version", "shape"):
        del attributes[name]


@mutation("same")
def legacy_compound_tables(file: h5py.File, folder: Path) -> None:
    """anndata before 0.7: tables as one compound dataset."""
    for place, length in (("obs", NUM_CELLS), ("var", NUM_GENES)):
        table = np.zeros(length, dtype=[("index", "S8"), ("n", "f4")])
        table["index"] = [f"n{i}".encode() for i in range(length)]
        replace(file, place, table)


@mutation("same")
def index_nullable_strings(file: h5py.File, folder: Path) -> None:
    """anndata 0.13: the index as a group of values and mask."""
    for place in ("obs/_index", "var/_index"):
        names = file[place][()]
        del file[place]
        group = file.create_group(place)
        group.attrs["encoding-type"], group.attrs["encoding-version"] = "nullable-string-array", "0.1.0"
        values = group.create_dataset("values", data=names, dtype=h5py.string_dtype())
        values.attrs["encoding-type"], values.attrs["encoding-version"] = "string-array", "0.2.0"
        mask = group.create_dataset("mask", data=np.zeros(len(names), dtype=bool))
        mask.attrs["encoding-type"], mask.attrs["encoding-version"] = "array", "0.2.0"


# --- files that reach outside themselves ---


@mutation("UnsafeFileError", "X", "another file")
def link_external_group(file: h5py.File, folder: Path) -> None:
    del file["X"]
    file["X"] = h5py.ExternalLink("elsewhere.h5", "/X")


@mutation("UnsafeFileError", "X/data", "another file")
def link_external_data(file: h5py.File, folder: Path) -> None:
    del file["X/data"]
    file["X/data"] = h5py.ExternalLink("/etc/hostname", "/data")


@mutation("UnsafeFileError", "obs", "another file")
def link_external_column(file: h5py.File, folder: Path) -> None:
    del file["obs/n_counts"]
    file["obs/n_counts"] = h5py.ExternalLink("elsewhere.h5", "/n")


@mutation("UnsafeFileError", "X/data", "external raw")
def raw_external_storage(file: h5py.File, folder: Path) -> None:
    count = file["X/data"].shape[0]
    (folder / "secret.bin").write_bytes(np.ones(count, np.float32).tobytes())
    del file["X/data"]
    file.create_dataset(
        "X/data", shape=(count,), dtype="f4", external=[(str(folder / "secret.bin"), 0, count * 4)]
    )


@mutation("UnsafeFileError", "X/data", "virtual")
def virtual_dataset_missing_source(file: h5py.File, folder: Path) -> None:
    count = file["X/data"].shape[0]
    layout = h5py.VirtualLayout(shape=(count,), dtype="f4")
    layout[:] = h5py.VirtualSource("nowhere.h5", "data", shape=(count,))
    del file["X/data"]
    file.create_virtual_dataset("X/data", layout)


@mutation("UnsafeFileError", "obs", "virtual")
def virtual_column(file: h5py.File, folder: Path) -> None:
    layout = h5py.VirtualLayout(shape=(NUM_CELLS,), dtype="f8")
    layout[:] = h5py.VirtualSource("nowhere.h5", "n", shape=(NUM_CELLS,))
    del file["obs/n_counts"]
    file.create_virtual_dataset("obs/n_counts", layout)


@mutation("UnsafeFileError", "loop")
def soft_link_loop(file: h5py.File, folder: Path) -> None:
    del file["X"]
    file["X"] = h5py.SoftLink("/Y")
    file["Y"] = h5py.SoftLink("/X")


@mutation("UnsafeFileError", "another file")
def soft_link_to_external(file: h5py.File, folder: Path) -> None:
    file["outside"] = h5py.ExternalLink("elsewhere.h5", "/")
    del file["X"]
    file["X"] = h5py.SoftLink("/outside/X")


@mutation("UnsafeFileError", "itself")
def group_in_itself(file: h5py.File, folder: Path) -> None:
    file["obs/loop"] = file["obs"]


@mutation("FormatError", "X")
def soft_link_dangling(file: h5py.File, folder: Path) -> None:
    del file["X/data"]
    file["X/data"] = h5py.SoftLink("/nowhere")


@mutation("same")
def soft_link_inside(file: h5py.File, folder: Path) -> None:
    file.move("X", "kept")
    file["X"] = h5py.SoftLink("/kept")


# --- bombs ---


@mutation("FormatError", "chunk")
def chunk_of_gigabytes(file: h5py.File, folder: Path) -> None:
    file["X"].create_dataset("new", shape=(2**40,), chunks=(2**28 + 1,), dtype="f8")
    del file["X/data"]
    file.move("X/new", "X/data")
    replace(file, "X/indices", np.empty(0, np.int32))
    del file["X/indices"]
    file["X"].create_dataset("indices", shape=(2**40,), chunks=(1024,), dtype="i4")


@mutation("FormatError", "X", "never written")
def row_of_terabytes(file: h5py.File, folder: Path) -> None:
    pointers = file["X/indptr"][()].astype(np.int64)
    pointers[-1] = 2**38
    replace(file, "X/indptr", pointers)
    for name, kind in (("data", "f4"), ("indices", "i4")):
        del file[f"X/{name}"]
        file["X"].create_dataset(name, shape=(2**38,), chunks=(4096,), dtype=kind, compression="gzip")


@mutation("ResourceError", "indptr")
def tables_of_terabytes(file: h5py.File, folder: Path) -> None:
    """Every length agrees, and the file is small all the same."""
    count = 2**39
    del file["obs/_index"], file["obs/n_counts"], file["X/indptr"]
    file["obs"].create_dataset("_index", shape=(count,), chunks=(4096,), dtype="S8", compression="gzip")
    file["obs"].create_dataset("n_counts", shape=(count,), chunks=(4096,), dtype="f8", compression="gzip")
    file["X"].create_dataset("indptr", shape=(count + 1,), chunks=(4096,), dtype="i8", compression="gzip")
    file["X"].attrs["shape"] = np.array([count, NUM_GENES])
