"""From a name to a folder, against a hub of our own on this machine: nothing leaves it."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from fnmatch import fnmatchcase
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import torch

from scfm.data.packed import PackedCells
from scfm.errors import IntegrityError, InvalidArgumentError, MissingDependencyError, MissingFileError
from scfm.models import hub
from scfm.models.weights import read_weights, write_safetensors

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "lab/Geneformer"


class FakeHub:
    """The few addresses of the hub's interface that fetching a snapshot asks for, over one repository."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                hub.answer(self, with_body=True)

            def do_HEAD(self) -> None:
                hub.answer(self, with_body=False)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def fetched(self) -> set[str]:
        """Files whose bytes were asked for."""
        prefix = f"GET /{REPO}/resolve/{COMMIT}/"
        return {line.removeprefix(prefix) for line in self.asked if line.startswith(prefix)}

    def answer(self, request: BaseHTTPRequestHandler, *, with_body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(f"{request.command} {path}")
        headers = {"X-Repo-Commit": COMMIT}
        status, body = 200, b""
        if path in (
            f"/api/models/{REPO}/revision/main",
            f"/api/models/{REPO}/revision/{COMMIT}",
            f"/api/models/{REPO}",
        ):
            names = [{"rfilename": name} for name in self.files]
            body = json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": names}).encode()
        elif path.startswith(f"/api/models/{REPO}/tree/{COMMIT}"):
            body = json.dumps([self._entry(name, content) for name, content in self.files.items()]).encode()
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/") and path.split(f"{COMMIT}/")[1] in self.files:
            body = self.files[path.split(f"{COMMIT}/")[1]]
            headers["ETag"] = f'"{hashlib.sha1(body).hexdigest()}"'
        else:
            status, headers = 404, {"X-Error-Code": "RevisionNotFound" if REPO in path else "RepoNotFound"}
        request.send_response(status)
        for key, value in {
            **headers,
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
        }.items():
            request.send_header(key, value)
        request.end_headers()
        if with_body:
            request.wfile.write(body)

    @staticmethod
    def _entry(name: str, content: bytes) -> dict[str, Any]:
        return {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}


def safetensors_bytes(folder: Path, value: float) -> bytes:
    write_safetensors(folder / "made.safetensors", {"a": torch.full((3,), value)})
    return (folder / "made.safetensors").read_bytes()


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[FakeHub]:
    """The authors' repository in small: a model at the root, others in folders, dictionaries beside them."""
    torch.save({"a": torch.full((3,), 3.0)}, tmp_path / "made.bin")
    old = (tmp_path / "made.bin").read_bytes()
    dictionary = json.dumps({"<pad>": 0, "<mask>": 1, "ENSG00000000003": 2}).encode()
    other = pickle.dumps({"<pad>": 0, "<mask>": 1, "<cls>": 2, "<eos>": 3, "ENSG00000000003": 4})
    files = {
        "config.json": b'{"model_type": "bert", "hidden_size": 1}',
        "model.safetensors": safetensors_bytes(tmp_path, 1.0),
        "pytorch_model.bin": old,
        "training_args.bin": b"a pickle",
        "README.md": b"read me",
        "geneformer/token_dictionary_gc104M.pkl": other,
        "geneformer/tokenizer.py": b"print('code')",
        "geneformer/other.pkl": b"not a dictionary",
        "geneformer/gene_dictionaries_30m/token_dictionary_gc30M.json": dictionary,
        "V1/config.json": b'{"model_type": "bert", "hidden_size": 2}',
        "V1/model.safetensors": safetensors_bytes(tmp_path, 2.0),
        "V1/training_args.bin": b"a pickle",
        "old/config.json": b'{"model_type": "bert", "hidden_size": 3}',
        "old/pytorch_model.bin": old,
        "scgpt/args.json": b'{"embsize": 1}',
        "scgpt/vocab.json": b"{}",
        "scgpt/best_model.pt": old,
        "scgpt/dev.pt": b"another pickle",
        "empty/README.md": b"nothing",
        **_sharded(tmp_path),
    }
    server = FakeHub(files)
    yield server
    server.server.shutdown()
    server.server.server_close()


def _sharded(folder: Path) -> dict[str, bytes]:
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    return {
        "sharded/config.json": b'{"model_type": "bert"}',
        "sharded/model.safetensors.index.json": json.dumps(index).encode(),
        "sharded/model-00001-of-00001.safetensors": safetensors_bytes(folder, 4.0),
    }


CALL = """
import json, sys
from scfm.errors import ScfmError
from scfm.models.hub import resolve
from scfm.models.weights import read_weights
from scfm.tokenize.dictionaries import GeneformerDictionaries
answers = []
for name, options in json.loads(sys.argv[1]):
    try:
        found = resolve(name, **options)
        weights = read_weights(found.folder)
        dictionaries = GeneformerDictionaries.find(found.folder, vocab_size=3) if name.endswith("V1") else None
        answers.append({
            "folder": str(found.folder), "repo_id": found.repo_id, "revision": found.revision,
            "subfolder": found.subfolder, "a": weights["a"].tolist()[0], "link": weights.source_file.is_symlink(),
            "dictionary": dictionaries and dictionaries.source,
        })
    except ScfmError as error:
        answers.append({"error": type(error).__name__, "message": str(error)})
print(json.dumps(answers))
"""


def environment_of(fake: FakeHub, home: Path, **extra: str) -> dict[str, str]:
    pytest.importorskip("huggingface_hub")
    return {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | {
        "HF_ENDPOINT": fake.address,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
        **extra,
    }


def ask(fake: FakeHub, home: Path, *calls: tuple[str, dict[str, Any]], **extra: str) -> list[dict[str, Any]]:
    """Resolve names in a child whose hub is the fake one and whose cache is ``home``."""
    environment = environment_of(fake, home, **extra)
    done = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps(calls)],
        env=environment, cwd=home.parent, capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    answers: list[dict[str, Any]] = json.loads(done.stdout)
    return answers


def test_scgpt_folders_are_fetched_with_their_arguments_and_vocabulary(fake: FakeHub, tmp_path: Path) -> None:
    (found,) = ask(fake, tmp_path / "home", (f"{REPO}/scgpt", {}))
    assert found["a"] == 3.0
    assert {name for name in fake.fetched() if name.startswith("scgpt/")} == {
        "scgpt/args.json",
        "scgpt/vocab.json",
        "scgpt/best_model.pt",
    }


def test_models_are_fetched_from_the_cache_layout_and_nothing_else_is(fake: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    root, v1, old, sharded = ask(
        fake,
        home,
        (REPO, {}),
        (f"{REPO}/V1", {}),
        (f"{REPO}/old", {"revision": COMMIT}),
        (f"{REPO}/sharded", {}),
    )
    assert [root["a"], v1["a"], old["a"], sharded["a"]] == [1.0, 2.0, 3.0, 4.0]
    assert (root["repo_id"], root["revision"], root["subfolder"]) == (REPO, COMMIT, None)
    assert (v1["revision"], v1["subfolder"]) == (COMMIT, "V1")
    assert root["link"] and v1["link"]  # into the cache's blobs
    assert str(v1["dictionary"]).endswith("geneformer/gene_dictionaries_30m/token_dictionary_gc30M.json")
    wanted = {
        "config.json", "model.safetensors", "geneformer/token_dictionary_gc104M.pkl",
        "geneformer/gene_dictionaries_30m/token_dictionary_gc30M.json",
        "V1/config.json", "V1/model.safetensors", "old/config.json", "old/pytorch_model.bin",
        "sharded/config.json", "sharded/model.safetensors.index.json", "sharded/model-00001-of-00001.safetensors",
    }  # fmt: skip
    assert fake.fetched() == wanted


def test_offline_serves_from_the_cache_and_asks_nobody(fake: FakeHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (before,) = ask(fake, home, (f"{REPO}/V1", {}))
    num_asked = len(fake.asked)
    after, absent = ask(fake, home, (f"{REPO}/V1", {}), ("lab/another", {}), HF_HUB_OFFLINE="1")
    assert len(fake.asked) == num_asked
    assert after == before and after["a"] == 2.0
    assert absent["error"] == "MissingFileError" and "offline" in absent["message"]


def test_what_the_hub_does_not_have_is_said(fake: FakeHub, tmp_path: Path) -> None:
    answers = ask(
        fake, tmp_path / "home",
        ("lab/nothing", {}), (REPO, {"revision": "no-such"}), (f"{REPO}/empty", {}), (f"{REPO}/nowhere", {}),
    )  # fmt: skip
    assert [answer["error"] for answer in answers] == ["MissingFileError"] * 4
    assert "config.json" in answers[2]["message"] and "owner/name/folder" in answers[3]["message"]
    assert all(fake.address not in answer["message"] for answer in answers)


def test_a_pinned_checksum_is_checked(fake: FakeHub, tmp_path: Path) -> None:
    digest = hashlib.sha256(fake.files["V1/model.safetensors"]).hexdigest()
    good, bad = ask(
        fake, tmp_path / "home", (f"{REPO}/V1", {"sha256": digest}), (f"{REPO}/V1", {"sha256": digest[::-1]})
    )
    assert good["a"] == 2.0
    assert bad["error"] == "IntegrityError" and digest in bad["message"]


def test_an_existing_path_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "lab" / "Geneformer"
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", {"a": torch.zeros(2)})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_from_hub", lambda *_: pytest.fail("the hub was asked"))
    for given in ("lab/Geneformer", folder, str(folder / "model.safetensors")):
        found = hub.resolve(given)
        assert (found.repo_id, found.revision) == (None, None)
        assert list(read_weights(found.folder)) == ["a"]
    with pytest.raises(InvalidArgumentError, match="revision"):
        hub.resolve(folder, revision="main")
    with pytest.raises(IntegrityError):
        hub.resolve(folder, sha256="0" * 64)
    with pytest.raises(MissingFileError, match="no weights"):
        hub.resolve(tmp_path, sha256="0" * 64)


@pytest.mark.parametrize(
    "name",
    [
        "nowhere",
        "./a/b",
        "/a/b",
        "../a/b",
        "a//b",
        "a/b/",
        "a/../b",
        "~/a",
        "a/.b",
        "",
        " a/b",
        "a/b\n",
        "a\\b",
    ],
)
def test_what_is_no_name_is_never_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(hub, "_from_hub", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(MissingFileError):
        hub.resolve(name) if name else hub.resolve(Path("missing/path"))


def test_without_the_hub_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MissingDependencyError, match=r"pip install scfm\[hub\]"):
        hub.resolve("lab/a-model-that-is-not-a-folder")


@pytest.mark.parametrize("subfolder", ["", "V1"])
def test_no_pattern_takes_code_or_a_stray_pickle(subfolder: str) -> None:
    patterns = hub._patterns(subfolder, (*hub._MODEL_FILES, hub._SHARDS))
    for name in (
        "training_args.bin", "pytorch_model.bin", "optimizer.pt", "modeling_x.py", "geneformer/tokenizer.py",
        "geneformer/other.pkl", "fine/model.safetensors", "V1/training_args.bin", "V2/config.json",
        "V2/model-00001-of-00002.safetensors", "rng_state.pth", "runs/token_dictionary.pkl",
    ):  # fmt: skip
        assert not any(fnmatchcase(name, pattern) for pattern in patterns), name


def test_a_whole_model_loads_by_its_hub_id(fake: FakeHub, tmp_path: Path, tiny_model: Any) -> None:
    for file in tiny_model.save(tmp_path / "model").iterdir():
        fake.files[f"tiny/{file.name}"] = file.read_bytes()
    code = (
        "import json, scfm\n"
        f"model = scfm.load('{REPO}/tiny', dtype='float32')\n"
        "X = model.embed(scfm.PackedCells.from_lists([[2, 9, 8, 7, 3]]))\n"
        "print(json.dumps([X[0].tolist(), model.source, model.load_report.to_dict()]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment_of(fake, tmp_path / "home"), capture_output=True, text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    embedding, source, report = json.loads(done.stdout)
    assert embedding == tiny_model.embed(PackedCells.from_lists([[2, 9, 8, 7, 3]]))[0].tolist()
    assert source == f"{REPO}/tiny" and report["revision"] == COMMIT
    assert list(report["sha256"]) == ["model.safetensors"]
