"""What the installed package does to the process and says in its errors (fault rows 83 to 85)."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from scfm.data.safe_pickle import load_mapping
from scfm.errors import ScfmError
from scfm.tokenize.dictionaries import GeneformerDictionaries

# Every event that the interpreter reports for a socket, a new process or a file opened for writing.
WATCHED_IMPORT = """
import sys
events = []
def watch(event, args):
    if event.startswith(("socket.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "urllib.")):
        events.append(event)
    if event == "open" and isinstance(args[0], (str, bytes)) and len(args) > 2:
        mode, flags = args[1] or "", args[2] or 0
        if set(str(mode)) & set("wax+") or flags & 3:
            events.append(f"open {args[0]!r} {mode}")
    if event in ("os.mkdir", "os.rename", "os.remove", "os.symlink"):
        events.append(f"{event} {args[0]!r}")
import torch, anndata, safetensors
sys.addaudithook(watch)
sys.dont_write_bytecode = True
import scfm
import scfm.errors, scfm.data.safe_pickle, scfm.tokenize.dictionaries
import scfm.models.weights, scfm.models.hub, scfm.models.folder, scfm.models.geneformer.config
print(events)
"""


def test_import_opens_no_socket_and_writes_no_file(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "HF_HOME": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", WATCHED_IMPORT],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_import_works_with_sockets_blocked_and_brings_no_hub(tmp_path: Path) -> None:
    code = (
        "import socket, sys\n"
        "class Blocked(socket.socket):\n"
        "    def __init__(self, *a, **k): raise AssertionError('a socket was opened')\n"
        "socket.socket = Blocked\n"
        "def no_connection(*a, **k): raise AssertionError('a connection was made')\n"
        "socket.create_connection = socket.getaddrinfo = no_connection\n"
        "import scfm, scfm.models.hub, scfm.models.weights\n"
        "print([name for name in ('huggingface_hub', 'httpx', 'requests') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_native_module_is_hardened() -> None:
    if sys.platform != "linux" or shutil.which("readelf") is None:
        pytest.skip("readelf is not installed")
    native = pytest.importorskip("scfm._native", reason="the native module is not built")
    headers = _readelf("-lW", native.__file__)
    dynamic = _readelf("-dW", native.__file__)
    symbols = _readelf("-sW", native.__file__)
    assert "GNU_RELRO" in headers
    assert re.search(r"BIND_NOW|FLAGS_1\).*NOW", dynamic), "not linked with -z now"
    assert re.search(r"GNU_STACK\s.*\sRW\s", headers), "the stack is executable"
    assert "__stack_chk_fail" in symbols, "not built with -fstack-protector"
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), "looks for libraries where it was built"


def _readelf(flags: str, path: str) -> str:
    return subprocess.run(["readelf", flags, path], capture_output=True, text=True, check=True).stdout


def errors(folder: Path) -> dict[str, ScfmError]:
    """Errors from files with a thousand wrong entries, and from a data set of a thousand named patients."""
    import json

    import scfm

    found = {}

    def note(name: str, call: object) -> None:
        try:
            call()  # type: ignore[operator]
        except ScfmError as error:
            found[name] = error
        else:
            raise AssertionError(f"{name} raised nothing")

    names = [f"PATIENT_{i:04d}" for i in range(1000)]
    lists = folder / "lists.json"
    lists.write_text(json.dumps({name: [1] for name in names}))
    note("values", lambda: load_mapping(lists))
    shared = folder / "token_dictionary_shared.json"
    shared.write_text(json.dumps({"<pad>": 0, "<mask>": 1, **dict.fromkeys(names, 2)}))
    note("shared ids", lambda: GeneformerDictionaries.from_files(shared))
    negative = folder / "token_dictionary_n.json"
    negative.write_text(json.dumps({"<pad>": 0, "<mask>": 1, **{n: -i - 1 for i, n in enumerate(names)}}))
    note("negative ids", lambda: GeneformerDictionaries.from_files(negative))
    (folder / "token_dictionary_m.json").write_text(json.dumps({"<pad>": 0, "<mask>": 1, names[0]: 2}))
    (folder / "gene_median_dictionary_m.json").write_text(json.dumps(dict.fromkeys(names, -1.0)))
    note("medians", lambda: GeneformerDictionaries.from_files(folder / "token_dictionary_m.json"))
    note("genes", lambda: GeneformerDictionaries.from_vocabulary(names * 2, {}, "V2"))
    cells = anndata.AnnData(
        sp.csr_matrix(np.full((1000, 3), np.nan, dtype=np.float32)),
        obs=pd.DataFrame({"name": names}, index=names),
    )
    note("cells", lambda: list(scfm.read(cells).blocks()))
    return found


def test_errors_show_at_most_five_ids_and_never_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SCFM_TEST_TOKEN", "hunter2-and-more")
    for name, error in errors(tmp_path).items():
        text = f"{error} {error!r} {error.__cause__}"
        assert len(set(re.findall(r"PATIENT_\d{4}", text))) <= 5, name
        assert "hunter2" not in text and os.environ["PATH"] not in text, name
        assert len(str(error)) < 2000, name
