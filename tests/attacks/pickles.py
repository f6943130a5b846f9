"""Pickles that call a function when an ordinary unpickler reads them.

Each stands inside an otherwise plain gene dictionary. A gadget marked live creates the canary file under
``pickle.loads``: a test proves that first, so that the canary's absence afterwards means something.
"""

from __future__ import annotations

import io
import pickle
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Gadget:
    """A call ``module.name(*arguments)``; ``{canary}`` in an argument becomes the canary's path."""

    module: str
    name: str
    arguments: tuple[str, ...] = ()
    live: bool = False

    @property
    def called(self) -> str:
        return f"{self.module}.{self.name}"


GADGETS = [
    Gadget("os", "system", ("touch '{canary}'",), live=True),
    Gadget("posix", "system", ("touch '{canary}'",), live=True),
    Gadget("os", "popen", ("touch '{canary}'",), live=True),
    Gadget("subprocess", "getoutput", ("touch '{canary}'",), live=True),
    Gadget("builtins", "eval", ("open('{canary}', 'w')",), live=True),
    Gadget("builtins", "exec", ("open('{canary}', 'w')",), live=True),
    Gadget("builtins", "open", ("{canary}", "w"), live=True),
    Gadget("__builtin__", "eval", ("open('{canary}', 'w')",), live=True),
    Gadget("cProfile", "run", ("open('{canary}', 'w')",), live=True),
    Gadget("logging", "FileHandler", ("{canary}",), live=True),
    Gadget("os", "mkdir", ("{canary}",), live=True),
    Gadget("sqlite3", "connect", ("{canary}",), live=True),
    Gadget("builtins", "getattr", ("text", "upper")),
    Gadget("builtins", "__import__", ("os",)),
    Gadget("functools", "partial", ("x",)),
    Gadget("pkgutil", "resolve_name", ("os:system",)),
    Gadget("importlib", "import_module", ("os",)),
    Gadget("operator", "methodcaller", ("upper",)),
    Gadget("operator", "attrgetter", ("__class__.__base__",)),
    Gadget("numpy", "load", ("x.npy",)),
    Gadget("torch", "load", ("x.bin",)),
    Gadget("torch.hub", "load", ("owner/repo", "model")),
    Gadget("runpy", "run_path", ("x.py",)),
    Gadget("ctypes", "CDLL", ("libx.so",)),
    Gadget("numpy._core.multiarray", "_reconstruct", ("x",)),
    Gadget("collections", "Counter", ()),
    Gadget("argparse", "Namespace", ()),
]


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def call(gadget: Gadget, canary: Path) -> bytes:
    """Protocol 2: GLOBAL, the arguments as a tuple, REDUCE."""
    arguments = b"".join(text(argument.format(canary=canary)) for argument in gadget.arguments)
    return f"c{gadget.module}\n{gadget.name}\n".encode() + b"(" + arguments + b"tR"


def dictionary(value: bytes, *, protocol: int = 2) -> bytes:
    """A pickle of {"ENSG00000000003": 2, "ENSG00000000005": <value>}."""
    head = b"\x80" + bytes([protocol])
    return head + b"}(" + text("ENSG00000000003") + b"K\x02" + text("ENSG00000000005") + value + b"u."


def malicious(gadget: Gadget, canary: Path) -> bytes:
    return dictionary(call(gadget, canary))


def other_ways(canary: Path) -> dict[str, bytes]:
    """os.system by every other opcode that can name or call something."""
    command = text(f"touch '{canary}'")
    system = text("os") + text("system")
    return {
        "STACK_GLOBAL": dictionary(system + b"\x93(" + command + b"tR", protocol=4),
        "STACK_GLOBAL from memo": dictionary(
            text("os") + b"q\x000" + text("system") + b"q\x010h\x00h\x01\x93(" + command + b"tR", protocol=4
        ),
        "INST": dictionary(b"(" + command + b"ios\nsystem\n"),
        "OBJ": dictionary(b"(cos\nsystem\n" + command + b"o"),
        "NEWOBJ": dictionary(b"cos\nsystem\n(" + command + b"t\x81"),
        "NEWOBJ_EX": dictionary(b"cos\nsystem\n(" + command + b"t}\x92", protocol=4),
        "EXT1": dictionary(b"\x82\x01(" + command + b"tR"),
        "EXT2": dictionary(b"\x83\x01\x00(" + command + b"tR"),
        "EXT4": dictionary(b"\x84\x01\x00\x00\x00(" + command + b"tR"),
        "PERSID": dictionary(b"Psomething\n"),
        "BINPERSID": dictionary(command + b"Q"),
        "BUILD": dictionary(b"ccollections\nOrderedDict\n)R}" + text("__class__") + command + b"sb"),
        "nested name": dictionary(
            text("os") + text("path.os.system") + b"\x93(" + command + b"tR", protocol=4
        ),
        "before the dict": b"\x80\x02cos\nsystem\n(" + command + b"tR0" + dictionary(b"K\x03")[2:],
        "object dtype": dictionary(b"cnumpy\ndtype\n(" + text("O8") + b"K\x00K\x01tR"),
        "call of a text": dictionary(command + b"(tR"),
    }


def torch_zip(pickled: bytes) -> bytes:
    """A file in torch's zip layout with this pickle in it."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return stream.getvalue()


def torch_legacy(pickled: bytes) -> bytes:
    """A file in torch's layout before 1.6: magic number, protocol, system, the object, its storage keys."""
    parts = [
        0x1950A86A20F9469CFC6C,
        1001,
        {"little_endian": True, "protocol_version": 1001, "type_sizes": {}},
    ]
    return b"".join(pickle.dumps(part, protocol=2) for part in parts) + pickled + pickle.dumps([], protocol=2)


def bombs() -> dict[str, bytes]:
    """Pickles that cost far more than their size, or claim to."""
    head = b"\x80\x04"
    memo = b"".join(
        b"(" + b"h" + bytes([level]) + b"h" + bytes([level]) + b"tq" + bytes([level + 1])
        for level in range(200)
    )
    return {
        "lists nested a million deep": head + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        "tuples nested a million deep": head + b")" + b"\x85" * 1_000_000 + b".",
        "dicts nested deep": head
        + b"".join(b"}" + text("k") for _ in range(30_000))
        + b"N"
        + b"s" * 30_000
        + b".",
        "marks": head + b"(" * 2_900_000 + b".",
        "memo doubling": head + b"}" + text("k") + b")q\x00" + memo + b"s.",
        "text of 1 TiB": head + b"}\x8d" + struct.pack("<Q", 1 << 40) + b"x",
        "bytes of 1 TiB": head + b"}\x8e" + struct.pack("<Q", 1 << 40) + b"x",
        "bytearray of 1 TiB": head + b"}\x96" + struct.pack("<Q", 1 << 40) + b"x",
        "text of 4 GiB": head + b"}X" + b"\xff\xff\xff\xff" + b"x",
        "integer of 2 GiB": head + b"}\x8b" + struct.pack("<i", 2**31 - 1) + b"x",
        "integer of negative length": head + b"}\x8b" + struct.pack("<i", -5) + b"x",
        "integer of 60,000 digits": head + b"}" + text("k") + b"L" + b"9" * 60_000 + b"L\ns.",
        "frame of 8 EiB": head + b"\x95" + struct.pack("<Q", 2**63) + b"}.",
        "memo index 4 G": head + b"}r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
        "3.2 million opcodes": head + b"}" + b"\x94" + b"h\x00" * 60_000 + b"N" * 3_200_000 + b".",
        "many memo entries": head + b"N" + b"".join(b"\x94" for _ in range(2_000_000)) + b".",
        "one line without end": b"L" + b"9" * 5_000_000,
    }
