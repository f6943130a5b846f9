"""``import scfm`` is nearly free on top of torch and anndata, and imports none of the optional packages."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = ("scanpy", "sklearn", "matplotlib", "umap", "huggingface_hub", "transformers", "typer", "triton")


def test_import_scfm_brings_no_optional_package() -> None:
    code = (
        "import sys, torch, anndata; before = set(sys.modules); import scfm; "
        "scfm.read, scfm.load, scfm.PackedCells; "
        f"print([m for m in {OPTIONAL!r} if m in sys.modules and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
