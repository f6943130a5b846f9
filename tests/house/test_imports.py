"""The rooms import one way only, and the parts that must stand alone do."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "python" / "scfm"
# A room may import itself and every room on an earlier line.
ORDER = [
    {"errors", "_native", "_cuda", "kernels"},
    {"data", "ops"},
    {"tokenize"},
    {"models"},
    {"evaluate"},
    {"embed", "train"},
    {"tasks"},
    {"plot"},
    {"demo"},
    {"cli"},
]
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def imported_rooms(file: Path) -> set[str]:
    """Rooms of scfm that a file imports, at its top or inside a function."""
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            if node.module == "scfm":
                rooms |= {alias.name for alias in node.names}
            elif node.module.startswith("scfm."):
                rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("scfm.")}
    return rooms - {"__version__"}


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_rooms_import_one_way(file: Path) -> None:
    room = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if room == "__init__":
        return
    assert room in LEVEL, f"{room} has no place in the order"
    for other in imported_rooms(file) - {room}:
        assert other in LEVEL, f"{file} imports scfm.{other}, which has no place in the order"
        assert LEVEL[other] < LEVEL[room], f"{file} in {room} imports {other}"


def test_families_do_not_import_each_other() -> None:
    families = {"geneformer", "scgpt", "scbert", "scfoundation"}
    for file in (PACKAGE / "models").glob("*/*.py"):
        others = families - {file.parent.name}
        text = file.read_text(encoding="utf-8")
        if file.parent.name in families:
            assert not any(f"scfm.models.{other}" in text for other in others), file


def test_evaluate_takes_arrays_only() -> None:
    for file in (PACKAGE / "evaluate").glob("*.py"):
        assert imported_rooms(file) <= {"errors", "evaluate"}, file


def imported_packages(file: Path) -> set[str]:
    """First parts of what a file imports absolutely, at its top or inside a function."""
    packages = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        packages |= {name.split(".")[0] for name in names}
    return packages - set(sys.stdlib_module_names)


def test_kernels_import_torch_and_triton_only() -> None:
    for file in (ROOT / "kernels").rglob("*.py"):
        assert imported_packages(file) <= {"torch", "triton"}, file


def test_gpu_scripts_import_what_a_bare_machine_has() -> None:
    """pybind11 only to build the CUDA module, where it is there."""
    scripts = sorted((ROOT / "benches" / "gpu").glob("*.py"))
    own = {file.stem for file in scripts} | {"shapes", "attention_peers"}
    for file in [*scripts, ROOT / "benches" / "attention_peers.py"]:
        assert imported_packages(file) <= {"torch", "triton", "numpy", "scfm", "pybind11", *own}, file


CSRC_ORDER = {"base": 0, "cpu": 1, "counts": 2, "tokenize": 2, "attention": 2, "cuda": 3, "bindings": 4}
CSRC_SUFFIXES = (".hpp", ".cpp", ".cu", ".cuh")


def test_csrc_includes_one_way_and_neither_python_nor_torch() -> None:
    files = [f for f in (ROOT / "csrc").rglob("*") if f.suffix in CSRC_SUFFIXES]
    assert files
    for file in files:
        room = file.relative_to(ROOT / "csrc").parts[0]
        for include in re.findall(r'#include\s+[<"]([^>"]+)[>"]', file.read_text(encoding="utf-8")):
            first = include.split("/")[0]
            if first in CSRC_ORDER and first != room:
                assert CSRC_ORDER[first] < CSRC_ORDER[room], f"{file} includes {include}"
            if room != "bindings":
                assert not re.match(r"(pybind11|Python\.h|torch|ATen|c10)", include), f"{file}: {include}"


def test_no_file_outgrows_its_concept() -> None:
    native = [file for file in (ROOT / "csrc").rglob("*") if file.suffix in CSRC_SUFFIXES]
    for file in [*FILES, *(ROOT / "kernels").glob("*.py"), *(ROOT / "benches" / "gpu").glob("*.py"), *native]:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 600, file
        assert file.stem not in {"utils", "helpers", "common", "misc"}, file


def test_operators_need_torch_alone() -> None:
    """scripts on a bare GPU machine import them, and import scfm, without anndata and its company."""
    program = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"anndata", "h5py", "pandas", "scipy", "safetensors", "zarr", "scanpy", "typer"}:
            raise ImportError(name)
sys.meta_path.insert(0, Nothing())
import scfm, scfm.ops, scfm.kernels
scfm.ops.varlen_attention
sys.path.insert(0, "benches")
import shapes
assert "torch._dynamo" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
