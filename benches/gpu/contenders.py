"""Who attends to packed cells: ours by every path, and the peers, each in the layout and the way that suits it best.

Nothing that a peer could prepare once is timed: its padding, masks, block masks and longest lengths are made before,
its compiling is warmed up. torch's scaled_dot_product_attention gets batches of cells sorted by length, so that it
pads little, and every backend it has; cells of one length go to it as a dense batch without a mask. FlexAttention is
compiled, plainly and with autotuning, and skips the blocks that its document mask empties.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any

import torch
from rows import Contender, Outputs
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from attention_peers import sdpa_padded
from scfm import ops
from scfm.ops import flash, paths

_BATCH = 8  # cells that the padded peer computes at once
_PATHS_OF_OTHERS = ("flash_attn_3", "flash_attn_2", "torch_varlen", "torch")
Operator = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Pack:
    """Cells end to end: q, k, v (T, H, D)."""

    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @property
    def cu_seqlens(self) -> Tensor:
        return torch.tensor([0, *itertools.accumulate(self.lengths)], dtype=torch.int32, device=self.q.device)

    @property
    def pairs(self) -> int:
        """Of a query and a key in one cell."""
        return sum(length**2 for length in self.lengths)


def random_pack(
    lengths: Sequence[int], num_heads: int, head_dim: int, dtype: torch.dtype, device: str
) -> Pack:
    generator = torch.Generator(device).manual_seed(0)
    shape = (sum(lengths), num_heads, head_dim)
    drawn = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    return Pack(*drawn, tuple(int(x) for x in lengths))


def ours(operator: str, pack: Pack, call: Operator) -> list[Contender]:
    """Our kernels by each path of the table that takes the tensors, the first of the table first."""
    found = []
    for path in paths.table(operator):
        if path.name in _PATHS_OF_OTHERS or (pack.q.is_cuda and path.name == "native"):
            continue
        name, why = f"scfm {path.name}", path.objection(pack.q)
        forced = partial(ops.use_path, operator, path.name)
        found.append(Contender(name, pack.qkv, {"": call}, absent=why, is_ours=True, around=forced))
    return found


# ---- packed peers -----------------------------------------------------------------------------------------------


def packed_peers(pack: Pack) -> list[Contender]:
    """torch's varlen_attn and flash-attn, which take cells end to end as we do; each with its own backward."""
    cells, longest = pack.cu_seqlens, max(pack.lengths)
    rest = (cells, cells, longest, longest)
    found = []
    for name, objection, module, function in (
        ("torch varlen_attn", flash.objection_torch, "torch.nn.attention.varlen", "varlen_attn"),
        ("flash-attn 3", flash.objection_version_3, "flash_attn_interface", "flash_attn_varlen_func"),
        ("flash-attn 2", flash.objection_version_2, "flash_attn", "flash_attn_varlen_func"),
    ):
        if (why := objection(pack.q)) is not None:
            found.append(Contender(name, absent=why))
            continue
        call = getattr(import_module(module), function)
        found.append(Contender(name, pack.qkv, {"": partial(_first_output, call, rest)}))
    return found


def _first_output(call: Callable[..., Any], rest: tuple[Any, ...], *qkv: Tensor) -> Tensor:
    out = call(*qkv, *rest)
    first: Tensor = out[0] if isinstance(out, tuple) else out
    return first


# ---- padded peers -----------------------------------------------------------------------------------------------


def padded_peer(pack: Pack) -> Contender:
    """scaled_dot_product_attention: one dense batch where all cells are as long, else sorted batches with a mask."""
    if len(set(pack.lengths)) == 1:
        return dense_peer(pack, None)
    order = sorted(range(len(pack.lengths)), key=lambda cell: -pack.lengths[cell])
    batches = [order[start : start + _BATCH] for start in range(0, len(order), _BATCH)]
    inputs: list[Tensor] = []
    masks = []
    for batch in batches:
        longest = pack.lengths[batch[0]]
        inputs += [_padded(x, pack, batch, longest) for x in pack.qkv]
        lengths = torch.tensor([pack.lengths[cell] for cell in batch], device=pack.q.device)
        seen = torch.arange(longest, device=pack.q.device) < lengths[:, None]
        masks.append(seen[:, None, None, :].expand(-1, 1, longest, longest))

    def call(*given: Tensor) -> list[Tensor]:
        return [sdpa_padded(*given[3 * i : 3 * i + 3], mask) for i, mask in enumerate(masks)]

    def unpack(out: Outputs) -> Tensor:
        cells: dict[int, Tensor] = {}
        for batch, padded in zip(batches, out, strict=True):
            cells |= {cell: padded[row, : pack.lengths[cell]] for row, cell in enumerate(batch)}
        return torch.cat([cells[cell] for cell in range(len(pack.lengths))])

    return Contender("torch SDPA, padded", tuple(inputs), _by_backend(call, pack.q.is_cuda), unpack)


def dense_peer(pack: Pack, mask: Tensor | None) -> Contender:
    """The same for cells of one length, with a boolean mask (C, 1, L, L) or none."""
    length = pack.lengths[0]
    inputs = tuple(x.view(-1, length, *x.shape[1:]) for x in pack.qkv)
    name = "torch SDPA, dense" + (", masked" if mask is not None else "")
    ways = _by_backend(lambda q, k, v: sdpa_padded(q, k, v, mask), pack.q.is_cuda)
    return Contender(name, inputs, ways, lambda out: _one(out).flatten(0, 1))


def _padded(x: Tensor, pack: Pack, batch: Sequence[int], longest: int) -> Tensor:
    offsets = pack.cu_seqlens.tolist()
    out = x.new_zeros(len(batch), longest, *x.shape[1:])
    for row, cell in enumerate(batch):
        out[row, : pack.lengths[cell]] = x[offsets[cell] : offsets[cell + 1]]
    return out


def _by_backend(call: Callable[..., Outputs], is_cuda: bool) -> dict[str, Callable[..., Outputs]]:
    if not is_cuda:
        return {"": call}

    def with_backend(backend: SDPBackend) -> Callable[..., Outputs]:
        def run(*given: Tensor) -> Outputs:
            with sdpa_kernel(backend):
                return call(*given)

        return run

    backends = {
        "cuDNN": SDPBackend.CUDNN_ATTENTION,
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return {name: with_backend(backend) for name, backend in backends.items()}


def _one(out: Outputs) -> Tensor:
    assert isinstance(out, Tensor)
    return out


# ---- FlexAttention ----------------------------------------------------------------------------------------------


def flex_peer(pack: Pack, mask: Callable[..., Tensor] | None = None) -> Contender:
    """FlexAttention over the whole pack: its document mask, and ``mask`` (batch, head, query, key) where given."""
    device, total = pack.q.device, sum(pack.lengths)
    lengths = torch.tensor(pack.lengths, device=device)
    document = torch.repeat_interleave(torch.arange(len(pack.lengths), device=device), lengths)

    def in_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = document[query] == document[key]
        return same if mask is None else same & mask(b, h, query, key)

    inputs = tuple(x.transpose(0, 1)[None].contiguous() for x in pack.qkv)
    try:
        blocks = create_block_mask(
            in_document, None, None, total, total, device=str(device), _compile=pack.q.is_cuda
        )
    except Exception as error:
        return Contender("torch FlexAttention", absent=f"no block mask: {str(error).splitlines()[0][:200]}")
    ways = {
        name: partial(_attend_in_blocks, attend, blocks)
        for name, attend in _flex_ways(pack.q.is_cuda).items()
    }
    name = "torch FlexAttention"
    return Contender(name, inputs, ways, lambda out: _one(out)[0].transpose(0, 1))


def _attend_in_blocks(attend: Callable[..., Tensor], blocks: Any, *qkv: Tensor) -> Tensor:
    return attend(*qkv, block_mask=blocks)


def _flex_ways(is_cuda: bool) -> dict[str, Callable[..., Any]]:
    """Compiled afresh for each shape, so that none is slowed down by having to serve others."""
    if not is_cuda:
        return {"not compiled": flex_attention}
    torch._dynamo.reset()
    return {
        "compiled": torch.compile(flex_attention, dynamic=False),
        "autotuned": torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs"),
    }
