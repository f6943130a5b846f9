"""A stack machine that reads a pickle as data, never as a program.

Python's unpickler is not used, not even a restricted one. The opcodes that plain dictionaries consist of
(text, numbers, tuples, one flat dict) are interpreted here. The few globals that such files need (a numpy
scalar, a numpy dtype, OrderedDict, the latin-1 coding of bytes) are symbols with a meaning of their own;
nothing is looked up, imported or called. Any other global ends the reading with its name.

Every cost is bounded before it is paid: opcodes, stack, memo and entries have limits, and a length prefix may
not exceed what is left of the file. A container inside a container is kept as a mark of its type only, so no
nesting, however deep, can be built.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from scfm.errors import FormatError, ScfmError, UnsafeCheckpointError

__all__ = ["kind_of", "read_dict", "shown"]

MAX_OPCODES = 3_000_000
MAX_STACK = 65_536
MAX_MEMO = 1_500_000
MAX_ENTRIES = 1_000_000
MAX_LINE = 1 << 16
MAX_SHOWN = 5


def read_dict(data: bytes, path: Path) -> dict[str, Any]:
    """The dict that the pickle ``data`` holds: text keys; values text, numbers, or a mark of their type.

    Raises UnsafeCheckpointError naming what would run code, FormatError for anything malformed or too large.
    """
    return _Machine(data, path).run()


def shown(key: object) -> str:
    """A key for an error message: never longer than a line, never asking an unknown object for its text."""
    text = repr(key) if type(key) in (str, int, float, bytes, bool) else type(key).__name__
    return text if len(text) <= 60 else f"{text[:57]}..."


class _Opaque:
    """Stands for a container or a constant that has no place in a flat dict; only its kind is kept."""

    def __init__(self, kind: str) -> None:
        self.kind = kind


class _Symbol:
    """A global of the allowlist, by what it does here."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Dtype:
    """A numpy dtype under construction: BUILD supplies the byte order after the fact."""

    def __init__(self, code: str) -> None:
        self.code = code
        self.layout = struct.Struct("<" + _SCALARS[code])


_SCALARS = {
    **{"i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q"},
    **{"f2": "e", "f4": "f", "f8": "d"},
}
_GLOBALS = {
    ("collections", "OrderedDict"): _Symbol("dict"),
    ("builtins", "dict"): _Symbol("dict"),
    ("numpy", "dtype"): _Symbol("dtype"),
    ("numpy.core.multiarray", "scalar"): _Symbol("scalar"),
    ("numpy._core.multiarray", "scalar"): _Symbol("scalar"),
    ("_codecs", "encode"): _Symbol("encode"),
}
_LIST, _TUPLE, _DICT, _NONE, _OTHER = map(_Opaque, ("list", "tuple", "dict", "None", "object"))
_PLAIN = frozenset({str, int, float, bytes, bool})


def kind_of(item: object) -> str:
    """The type of a value as an error message names it."""
    return item.kind if isinstance(item, _Opaque) else type(item).__name__


class _Machine:
    """Runs the opcodes of one pickle as data. ``run`` gives the dict at its top."""

    def __init__(self, data: bytes, path: Path) -> None:
        self.data = data
        self.path = path
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> dict[str, Any]:
        try:
            self._loop()
        except ScfmError:
            raise
        except (IndexError, KeyError, ValueError, TypeError, struct.error, OverflowError) as error:
            raise FormatError(
                f"truncated or malformed pickle at byte {self.position:,} ({type(error).__name__})",
                path=self.path,
            ) from None
        if self.position != len(self.data):
            self.fail(f"{len(self.data) - self.position:,} bytes follow the end")
        if len(self.stack) != 1 or type(self.stack[0]) is not dict:
            self.fail(f"expected one dict, found {kind_of(self.stack[0]) if self.stack else 'nothing'}")
        result: dict[str, Any] = self.stack[0]
        return result

    def _loop(self) -> None:
        data, stack = self.data, self.stack
        for _ in range(MAX_OPCODES):
            opcode = data[self.position]
            self.position += 1
            handler = _HANDLERS.get(opcode)
            if handler is not None:
                handler(self)
            elif opcode == _STOP:
                return
            else:
                self.refuse_opcode(opcode)
            if len(stack) > MAX_STACK:
                self.fail(f"more than {MAX_STACK:,} objects wait on the stack")
        self.fail(f"more than {MAX_OPCODES:,} opcodes")

    def fail(self, message: str) -> NoReturn:
        raise FormatError(f"not a plain dictionary: {message} (byte {self.position:,})", path=self.path)

    def unsafe(self, what: str) -> NoReturn:
        raise UnsafeCheckpointError(
            f"this pickle asks for {what}, which could run code; it was not read",
            path=self.path,
            hint="A dictionary needs strings and numbers only. Ask its author for a JSON file.",
        )

    def refuse_opcode(self, opcode: int) -> NoReturn:
        name = _REFUSED.get(opcode)
        if name == "INST":
            self.unsafe(f"the global {self.global_name(self.line(), self.line())}")
        if name is not None:
            self.unsafe(f"opcode {name}")
        self.fail(f"opcode {opcode:#04x} is not used by plain dictionaries")

    def take(self, count: int) -> bytes:
        start = self.position
        if count < 0 or count > len(self.data) - start:
            self.fail(f"a length of {count:,} is more than the {len(self.data) - start:,} bytes left")
        self.position = start + count
        return self.data[start : start + count]

    def number(self, layout: str) -> Any:
        return struct.unpack(layout, self.take(struct.calcsize(layout)))[0]

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position, self.position + MAX_LINE)
        if end < 0:
            self.fail("a line has no end")
        start, self.position = self.position, end + 1
        return self.data[start:end]

    def since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        if mark > len(self.stack):
            self.fail("items below a mark were consumed")
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    @staticmethod
    def global_name(module: object, name: object) -> str:
        parts = [
            part.decode("utf-8", "replace") if isinstance(part, bytes) else part for part in (module, name)
        ]
        if not all(isinstance(part, str) for part in parts):
            return "with a name that is not text"
        return ".".join(str(part) for part in parts)[:200]

    def push_global(self, module: object, name: object) -> None:
        symbol = _GLOBALS.get((module, name)) if type(module) is type(name) is str else None
        if symbol is None:
            self.unsafe(f"the global {self.global_name(module, name)}")
        self.stack.append(symbol)

    def push_tuple(self, items: list[Any]) -> None:
        # A tuple inside a tuple has no use here, and kept whole it could nest without limit.
        nested = any(type(item) in (tuple, dict) for item in items)
        self.stack.append(_TUPLE if nested or len(items) > 16 else tuple(items))

    def memoize(self, index: int) -> None:
        if len(self.memo) >= MAX_MEMO:
            self.fail(f"more than {MAX_MEMO:,} objects are memoized")
        self.memo[index] = self.stack[-1]

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        keys, values = items[0::2], items[1::2]
        if type(target) is not dict or len(keys) != len(values):
            self.fail("items are set on something that is not a dict")
        if set(map(type, keys)) - {str}:
            wrong = [key for key in keys if type(key) is not str][:MAX_SHOWN]
            self.fail(
                "keys must be text, found " + ", ".join(f"{shown(key)} ({kind_of(key)})" for key in wrong)
            )
        if not set(map(type, values)) <= _PLAIN:
            values = [item if type(item) in _PLAIN else _opaque(item) for item in values]
        before = len(target)
        target.update(zip(keys, values, strict=True))
        if len(target) != before + len(keys):
            self.fail("a key is set twice")
        if len(target) > MAX_ENTRIES:
            self.fail(f"more than {MAX_ENTRIES:,} entries")

    def reduce(self) -> None:
        arguments = self.stack.pop()
        function = self.stack.pop()
        if type(function) is not _Symbol or type(arguments) is not tuple:
            self.unsafe("a call of something that is not a plain constructor")
        self.stack.append(_CALLS[function.name](self, *arguments))

    def build(self) -> None:
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is not _Dtype:
            self.unsafe("opcode BUILD on something that is not a numpy dtype")
        known = type(state) is tuple and len(state) >= 5 and state[1] in ("<", ">", "=", "|")
        if not known or any(part is not None for part in state[2:5]):
            self.fail("a numpy dtype that is not a plain number")
        target.layout = struct.Struct((">" if state[1] == ">" else "<") + _SCALARS[target.code])

    def call_dict(self, *arguments: Any) -> dict[str, Any]:
        if arguments:
            self.fail("a dict is built from arguments")
        return {}

    def call_dtype(self, code: Any, *flags: Any) -> _Dtype:
        if (
            type(code) is not str
            or code not in _SCALARS
            or any(type(flag) not in (bool, int) for flag in flags)
        ):
            self.fail(f"numpy dtype {shown(code)} is not a plain number")
        return _Dtype(code)

    def call_scalar(self, dtype: Any, raw: Any) -> Any:
        if type(dtype) is not _Dtype or type(raw) is not bytes:
            self.fail("a numpy scalar without dtype and bytes")
        return dtype.layout.unpack(raw)[0]

    def call_encode(self, text: Any, coding: Any) -> bytes:
        if type(text) is not str or coding not in ("latin1", "latin-1"):
            self.fail("bytes in an unknown coding")
        return text.encode("latin-1")

    def global_text(self) -> None:
        module, name = self.line().decode("utf-8"), self.line().decode("utf-8")
        self.push_global(module, name)

    def global_stack(self) -> None:
        name = self.stack.pop()
        self.push_global(self.stack.pop(), name)

    def short_text(self) -> None:
        # Nine opcodes in ten are this one: its length needs no struct.
        start = self.position + 1
        end = start + self.data[self.position]
        if end > len(self.data):
            self.fail("truncated text")
        self.position = end
        self.stack.append(self.data[start:end].decode("utf-8"))

    def dict_since_mark(self) -> None:
        items = self.since_mark()
        self.stack.append({})
        self.set_items(items)

    def list_since_mark(self) -> None:
        self.since_mark()
        self.stack.append(_LIST)

    def append_one(self) -> None:
        self.stack.pop()
        if self.stack[-1] is not _LIST:
            self.fail("an item is appended to something that is not a list")

    def append_many(self) -> None:
        self.since_mark()
        if self.stack[-1] is not _LIST:
            self.fail("items are appended to something that is not a list")

    def integer_line(self) -> None:
        text = self.line().rstrip(b"L")
        if len(text) > 40:
            self.fail(f"an integer of {len(text):,} digits")
        self.stack.append(text == b"01" if text in (b"00", b"01") else int(text))

    def long_bytes(self, count: int) -> None:
        if count > 16:
            self.fail(f"an integer of {count:,} bytes")
        self.stack.append(int.from_bytes(self.take(count), "little", signed=True))

    def frame(self) -> None:
        if self.number("<Q") > len(self.data) - self.position:
            self.fail("a frame is longer than what is left of the file")

    def protocol(self) -> None:
        if self.number("<B") > 5:
            self.fail("unknown pickle protocol")

    def push(self, item: Any) -> None:
        self.stack.append(item)

    def pop_items(self, count: int) -> list[Any]:
        if count > len(self.stack):
            self.fail("the stack is empty")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items


def _opaque(item: object) -> _Opaque:
    if isinstance(item, _Opaque):
        return item
    return {"tuple": _TUPLE, "dict": _DICT, "NoneType": _NONE}.get(type(item).__name__, _OTHER)


_CALLS: dict[str, Callable[..., Any]] = {
    "dict": _Machine.call_dict,
    "dtype": _Machine.call_dtype,
    "scalar": _Machine.call_scalar,
    "encode": _Machine.call_encode,
}
_STOP = ord(".")
_NAMED: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    b"(": lambda m: m.marks.append(len(m.stack)),
    b"}": lambda m: m.push({}),
    b"d": _Machine.dict_since_mark,
    b"s": lambda m: m.set_items(m.pop_items(2)),
    b"u": lambda m: m.set_items(m.since_mark()),
    b"]": lambda m: m.push(_LIST),
    b"l": _Machine.list_since_mark,
    b"a": _Machine.append_one,
    b"e": _Machine.append_many,
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push_tuple(m.since_mark()),
    b"\x85": lambda m: m.push_tuple(m.pop_items(1)),
    b"\x86": lambda m: m.push_tuple(m.pop_items(2)),
    b"\x87": lambda m: m.push_tuple(m.pop_items(3)),
    b"\x8c": _Machine.short_text,
    b"X": lambda m: m.push(m.take(m.number("<I")).decode("utf-8")),
    b"\x8d": lambda m: m.push(m.take(m.number("<Q")).decode("utf-8")),
    b"V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
    b"C": lambda m: m.push(m.take(m.number("<B"))),
    b"B": lambda m: m.push(m.take(m.number("<I"))),
    b"\x8e": lambda m: m.push(m.take(m.number("<Q"))),
    b"I": _Machine.integer_line,
    b"L": _Machine.integer_line,
    b"J": lambda m: m.push(m.number("<i")),
    b"K": lambda m: m.push(m.number("<B")),
    b"M": lambda m: m.push(m.number("<H")),
    b"\x8a": lambda m: m.long_bytes(m.number("<B")),
    b"\x8b": lambda m: m.long_bytes(m.number("<I")),
    b"F": lambda m: m.push(float(m.line())),
    b"G": lambda m: m.push(m.number(">d")),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"\x94": lambda m: m.memoize(len(m.memo)),
    b"q": lambda m: m.memoize(m.number("<B")),
    b"r": lambda m: m.memoize(m.number("<I")),
    b"p": lambda m: m.memoize(int(m.line())),
    b"h": lambda m: m.push(m.memo[m.number("<B")]),
    b"j": lambda m: m.push(m.memo[m.number("<I")]),
    b"g": lambda m: m.push(m.memo[int(m.line())]),
    b"c": _Machine.global_text,
    b"\x93": _Machine.global_stack,
    b"R": _Machine.reduce,
    b"b": _Machine.build,
}
_HANDLERS = {name[0]: handler for name, handler in _NAMED.items()}
_REFUSED = {
    ord("i"): "INST",
    ord("o"): "OBJ",
    0x81: "NEWOBJ",
    0x92: "NEWOBJ_EX",
    0x82: "EXT1",
    0x83: "EXT2",
    0x84: "EXT4",
    ord("P"): "PERSID",
    ord("Q"): "BINPERSID",
    0x97: "NEXT_BUFFER",
}
