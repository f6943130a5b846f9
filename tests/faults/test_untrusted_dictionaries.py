"""No dictionary file runs code, exhausts the machine, or comes back in part (fault rows 3 to 6)."""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attacks.pickles import GADGETS, Gadget, bombs, malicious, other_ways
from scfm.data.safe_pickle import load_mapping
from scfm.errors import FormatError, MissingFileError, ScfmError, UnsafeCheckpointError

LIVE = [gadget for gadget in GADGETS if gadget.live]


def written(folder: Path, content: bytes, name: str = "token_dictionary.pkl") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("gadget", GADGETS, ids=lambda gadget: gadget.called)
def test_a_gadget_is_refused_by_name_and_not_run(gadget: Gadget, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    path = written(tmp_path, malicious(gadget, canary))
    for value in ("int", "float", "str"):
        with pytest.raises(UnsafeCheckpointError, match=gadget.called.replace(".", r"\.")):
            load_mapping(path, value=value)  # type: ignore[call-overload]
    assert not canary.exists()


def test_the_live_gadgets_are_live(tmp_path: Path) -> None:
    """Each creates its canary under Python's own unpickler, in a child: absence above is no accident."""
    for index, gadget in enumerate(LIVE):
        written(tmp_path, malicious(gadget, tmp_path / f"canary{index}"), f"{index}.pkl")
    code = (
        "import pickle, sys\n"
        f"for i in range({len(LIVE)}):\n"
        "    try: pickle.loads(open(f'{i}.pkl', 'rb').read())\n"
        "    except Exception: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    alive = [gadget.called for index, gadget in enumerate(LIVE) if (tmp_path / f"canary{index}").exists()]
    assert alive == [gadget.called for gadget in LIVE]


@pytest.mark.parametrize("way", sorted(other_ways(Path("canary"))))
def test_no_other_opcode_names_or_calls(way: str, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises((UnsafeCheckpointError, FormatError)) as caught:
        load_mapping(written(tmp_path, other_ways(canary)[way]))
    assert not canary.exists()
    harmless = {"before the dict", "object dtype", "STACK_GLOBAL from memo"}
    assert way in harmless or isinstance(caught.value, UnsafeCheckpointError)


@pytest.mark.parametrize("bomb", sorted(bombs()))
def test_a_bomb_fails_fast_in_little_memory(bomb: str, tmp_path: Path) -> None:
    path = written(tmp_path, bombs()[bomb])
    code = (
        "import resource, sys, time\n"
        "from scfm.data.safe_pickle import load_mapping\n"
        "from scfm.errors import FormatError\n"
        "resource.setrlimit(resource.RLIMIT_AS, (200 << 20, 200 << 20))\n"
        "start = time.process_time()\n"
        "try: load_mapping(sys.argv[1]); print('loaded')\n"
        "except FormatError as error: print('refused', time.process_time() - start)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]
    outcome, seconds = done.stdout.split()
    assert outcome == "refused"
    assert float(seconds) < 1.5


SMALL: dict[str, dict[str, Any]] = {
    "int": {"ENSG00000000003": 2, "ENSG00000000005": 70_000, "<pad>": 0, "é": 2**40},
    "float": {"ENSG00000000003": np.float64(1.5), "ENSG00000000005": np.float32(0.25), "x": 2.0},
    "str": {"TSPAN6": "ENSG00000000003", "TNMD": "ENSG00000000005"},
}


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("value", SMALL)
def test_truncated_at_every_byte_never_gives_a_part(value: str, protocol: int, tmp_path: Path) -> None:
    whole = pickle.dumps(SMALL[value], protocol=protocol)
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            load_mapping(written(tmp_path, whole[:length]), value=value)  # type: ignore[call-overload]
    assert load_mapping(written(tmp_path, whole), value=value) == SMALL[value]  # type: ignore[call-overload]


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ({f"g{i}": [1] for i in range(9)}, "int"),
        ({f"g{i}": (1, 2) for i in range(9)}, "int"),
        ({f"g{i}": {"a": 1} for i in range(9)}, "int"),
        ({f"g{i}": None for i in range(9)}, "str"),
        ({f"g{i}": True for i in range(9)}, "int"),
        ({f"g{i}": 1.0 for i in range(9)}, "int"),
        ({f"g{i}": "1" for i in range(9)}, "int"),
        ({f"g{i}": 1 for i in range(9)}, "str"),
        ({f"g{i}": b"x" for i in range(9)}, "str"),
        ({f"g{i}": float("nan") for i in range(9)}, "float"),
        ({f"g{i}": np.float32("inf") for i in range(9)}, "float"),
    ],
)
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_wrong_values_are_counted_and_five_are_named(
    content: dict[str, Any], value: str, protocol: int, tmp_path: Path
) -> None:
    if protocol < 3 and isinstance(content["g0"], bytes):
        content = dict.fromkeys(content, b"\xff")
    path = written(tmp_path, pickle.dumps({"good": _good(value), **content}, protocol=protocol))
    with pytest.raises(FormatError) as caught:
        load_mapping(path, value=value)  # type: ignore[call-overload]
    message = str(caught.value)
    assert [f"'g{i}'" in message for i in range(9)] == [True] * 5 + [False] * 4
    assert " 9 " in message


def _good(value: str) -> Any:
    return {"int": 1, "float": 1.0, "str": "x"}[value]


@pytest.mark.parametrize(
    "content", [[1, 2], "text", 5, None, (1,), {1: 2}, {None: 1}, {("a",): 1}, {b"a": 1}]
)
def test_what_is_no_dictionary_of_text_is_refused(content: Any, tmp_path: Path) -> None:
    for protocol in range(2, 6):
        with pytest.raises((FormatError, UnsafeCheckpointError)):  # old protocols call for set and bytes
            load_mapping(written(tmp_path, pickle.dumps(content, protocol=protocol)))


def test_bytes_after_the_end_and_a_key_set_twice_are_refused(tmp_path: Path) -> None:
    whole = pickle.dumps({"a": 1})
    with pytest.raises(FormatError, match="follow the end"):
        load_mapping(written(tmp_path, whole + b"x"))
    with pytest.raises(FormatError, match="twice"):
        load_mapping(written(tmp_path, b"\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u."))


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16]).flatmap(
        lambda kind: st.integers(np.iinfo(kind).min, np.iinfo(kind).max).map(kind)
    ),
)
FLOATS = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(width=32, allow_nan=False, allow_infinity=False).map(np.float32),
    st.floats(width=16, allow_nan=False, allow_infinity=False).map(np.float16),
    st.floats(allow_nan=False, allow_infinity=False).map(np.float64),
)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)


@given(st.data(), st.integers(0, 5), st.booleans())
@settings(max_examples=150, deadline=None)
def test_reads_what_python_wrote(data: st.DataObject, protocol: int, ordered: bool) -> None:
    """Against Python's own unpickler, for every protocol: equal keys, values, order and plain types."""
    value, values, kind = data.draw(
        st.sampled_from([("int", NUMBERS, int), ("float", FLOATS, float), ("str", TEXT, str)])
    )
    content = data.draw(st.dictionaries(TEXT, values, max_size=30))
    raw = pickle.dumps(OrderedDict(content) if ordered else content, protocol=protocol)
    found = _load_bytes(raw, value)
    assert found == pickle.loads(raw)
    assert list(found) == list(content)
    assert {type(item) for item in found.values()} <= {kind}


@given(st.data(), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_a_damaged_file_gives_a_flat_dictionary_or_an_error(data: st.DataObject, protocol: int) -> None:
    value = data.draw(st.sampled_from(sorted(SMALL)))
    raw = bytearray(pickle.dumps(SMALL[value], protocol=protocol))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
    try:
        found = _load_bytes(bytes(raw), value)
    except ScfmError:
        return
    kinds = {"int": int, "float": float, "str": str}
    assert all(type(key) is str and type(item) is kinds[value] for key, item in found.items())


def _load_bytes(raw: bytes, value: str) -> dict[str, Any]:
    from scfm.data.pickle_machine import read_dict
    from scfm.data.safe_pickle import _checked

    return _checked(read_dict(raw, Path("x.pkl")), value, Path("x.pkl"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": 1, "a": 2}', "twice"),
        (b'{"a": 1', "JSON"),
        (b"[1]", "object"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": 1e999}', "not finite"),
        (b'{"a": [1]}', "'a'"),
        (b'{"a":' * 50_000, "JSON"),
        (b"\xff\xfe", "JSON"),
        (b'{"a": ' + b"9" * 10_000 + b"}", "JSON|large"),
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
    ],
)
def test_json_is_read_strictly(content: bytes, says: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=says):
        load_mapping(written(tmp_path, content, "d.json"), value="float")


def test_a_gzip_bomb_and_a_cut_gzip_are_refused(tmp_path: Path) -> None:
    import gzip

    whole = gzip.compress(b'{"a": 1}')
    assert load_mapping(written(tmp_path, whole, "d.json.gz")) == {"a": 1}
    bomb = gzip.compress(b" " * (70 << 20), compresslevel=9)
    for content in (whole[:-1], whole + b"x", b"\x1f\x8b nothing", bomb):
        with pytest.raises(FormatError):
            load_mapping(written(tmp_path, content, "d.json.gz"))


def test_absent_special_and_unknown_files(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        load_mapping(tmp_path / "none.pkl")
    with pytest.raises(FormatError, match="regular file"):
        load_mapping(tmp_path)
    with pytest.raises(FormatError, match="must be a"):
        load_mapping(written(tmp_path, b"{}", "d.txt"))
    with pytest.raises(FormatError, match="git lfs pull"):
        load_mapping(written(tmp_path, b"version https://git-lfs.github.com/spec/v1\n"))
