"""The type stub names exactly what the module has, argument for argument."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from scfm import _native as native

STUB = Path(__file__).parents[2] / "python" / "scfm" / "_native.pyi"


def test_stub_matches_module() -> None:
    tree = ast.parse(STUB.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    in_module = {name for name in dir(native) if not name.startswith("__")}
    assert in_module == functions.keys() | classes.keys()
    for name, node in functions.items():
        signature = (getattr(native, name).__doc__ or "").splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == [argument.arg for argument in node.args.args], name
    for name, node in classes.items():
        members = {item.name for item in node.body if isinstance(item, ast.FunctionDef)} - {"__init__"}
        inherited = set(dir(BaseException)) if issubclass(getattr(native, name), BaseException) else set()
        found = {member for member in dir(getattr(native, name)) if not member.startswith("_")}
        assert members == found - inherited
