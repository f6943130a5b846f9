"""A copy of this rank's chunks in host memory, laid out as the file that will hold them.

Training goes on while the file is written, so the numbers must be copied first; that copy is all a save costs the
loop. It goes into one buffer that is kept from save to save (pages that were touched once, and pinned where the
tensors are on a GPU), in the order of the safetensors data section: writing is then one pass over one piece of memory.

The file is what torch.distributed.checkpoint's HuggingFaceStorageWriter would write, offsets of chunks in the
header's metadata included, so that its reader resolves any resharding (restore.py). It is not written by that
writer: its asynchronous form runs collectives between the ranks in a background thread, over a process group of its
own that has to end well; a failure comes as a BaseException that ordinary clean-up misses; it holds every byte once
more in memory; and a full disk shows only with the last byte. Here the room is reserved first, threads touch nothing
but files, training stands still for a third of the time and the bytes are safe in a sixth of it
(benches/bench_checkpoint.py).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence

import torch

from scfm.errors import CheckpointError
from scfm.train.checkpoint.ownership import Chunk

__all__ = ["SHARDING_INFO", "Snapshot", "dtype_of", "shard_name"]

SHARDING_INFO = "DCP_SHARDING_INFO"
_FORMAT = {"DCP_VERSION": "1.0", "format": "pt"}
_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def shard_name(rank: int, world_size: int) -> str:
    return f"shard-{rank:05d}-of-{world_size:05d}.safetensors"


def dtype_of(name: str) -> torch.dtype | None:
    """The dtype that a safetensors header calls so; None if no checkpoint of ours holds it."""
    return _DTYPES.get(name)


class Snapshot:
    """The buffer, and how the chunks that were last copied lie in it."""

    def __init__(self) -> None:
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._num_bytes = 0
        self._header = b""

    def take(self, chunks: Sequence[Chunk]) -> None:
        """Copy the chunks; afterwards their tensors may change. Nobody may be reading ``pieces`` meanwhile."""
        # Widest dtype first: every tensor is then aligned to its own size, as torch's views ask for.
        ordered = sorted(chunks, key=lambda chunk: (-chunk.values.element_size(), chunk.name))
        self._num_bytes = sum(chunk.values.nbytes for chunk in ordered)
        device = next((c.values.device for c in ordered if c.values.device.type == "cuda"), None)
        self._make_room(pinned=device is not None)
        header: dict[str, object] = {}
        position = 0
        for chunk in ordered:
            end = position + chunk.values.nbytes
            place = self._buffer[position:end].view(chunk.values.dtype).view(chunk.values.shape)
            place.copy_(chunk.values, non_blocking=True)
            header[chunk.name] = _described(chunk, position, end)
            position = end
        if device is not None:
            torch.cuda.current_stream(device).synchronize()
        offsets = {chunk.name: {"saved_offsets": list(chunk.offsets)} for chunk in ordered}
        header["__metadata__"] = {**_FORMAT, SHARDING_INFO: json.dumps(offsets)}
        text = json.dumps(header, separators=(",", ":")).encode()
        text = text.ljust(-(-len(text) // 8) * 8)
        self._header = struct.pack("<Q", len(text)) + text

    def pieces(self) -> list[bytes | memoryview]:
        """The file's bytes, not copied: header, then data, if this rank has any to write."""
        data = self._buffer[: self._num_bytes].numpy().data
        return [self._header, data] if self._num_bytes else [self._header]

    def _make_room(self, *, pinned: bool) -> None:
        if self._buffer.numel() < self._num_bytes or self._buffer.is_pinned() != pinned:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # let go of the old one first
            self._buffer = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=pinned)


def _described(chunk: Chunk, begin: int, end: int) -> dict[str, object]:
    dtype = _NAMES.get(chunk.values.dtype)
    if dtype is None:
        raise CheckpointError(
            f"has dtype {chunk.values.dtype}, which checkpoints do not hold", where=f"tensor {chunk.name!r}"
        )
    return {"dtype": dtype, "shape": list(chunk.values.shape), "data_offsets": [begin, end]}
