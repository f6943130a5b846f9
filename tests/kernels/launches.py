"""A GPU that only takes notes: what the operators' launches ask of Triton, on a machine without any GPU.

``python launches.py`` prints a line of JSON a launch that went through Triton's own launcher or a kept one. Kernels
are neither compiled nor run, so what they would have written is arbitrary; which variants are asked for, with which
options and over which grids, is real. It must be a process of its own, without the interpreter.
"""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace
from typing import Any

import torch
import triton
import triton.compiler
from triton.backends.compiler import GPUTarget

NOTES: list[dict[str, Any]] = []


class _Driver:
    """As much of Triton's driver as a launch asks: an H100 without memory."""

    utils = SimpleNamespace()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class _Compiled:
    """In the place of a compiled kernel; made once a variant, called directly where a launch was kept."""

    function = packed_metadata = None

    def __init__(self, name: str, options: dict[str, Any], signature: dict[str, str]) -> None:
        self.name, self.options = name, options
        self.note("compiled", None, signature=signature)

    def note(self, what: str, grid: Any, **more: Any) -> None:
        NOTES.append({"kernel": self.name, "what": what, "grid": grid, **self.options, **more})

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.note("launched by triton", arguments[:3])

    def __getitem__(self, grid: tuple[int, int, int]) -> Any:
        return lambda *arguments: self.note("launched", (*grid, len(arguments)))


def _compile(src: Any, *, target: GPUTarget, options: dict[str, Any]) -> _Compiled:
    kept = {name: options[name] for name in ("enable_fp_fusion", "num_warps", "num_stages")}
    signature = {
        name: kind + ":16" * bool(src.attrs.get((place,)))
        for place, (name, kind) in enumerate(src.signature.items())
        if kind != "constexpr"
    }
    return _Compiled(src.fn.__name__, kept, signature)


def attention(total: int, seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(total, 3, 4, 64, generator=generator).bfloat16()
    return [*qkv.unbind(1), torch.randn(total, 4, 64, generator=generator).bfloat16()]


def run_every_operator(lengths: list[int]) -> None:
    """Forward and backward of each, on a pack of these cells; what depends on results is made of zeros."""
    from scfm.kernels import embed_norm, favor_attention, generative_attention, masked_head, varlen_attention
    from scfm.kernels import graph_attention as graph

    total = sum(lengths)
    cells = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    known = cells.diff() // 2
    q, k, v, upstream = attention(total, total)
    lse = torch.zeros(total, 4)
    out = torch.zeros_like(q)
    varlen_attention.forward(q, k, v, cells, cells, 0.125)
    varlen_attention.backward(upstream, q, k, v, out, lse, cells, cells, 0.125)
    generative_attention.forward(q, k, v, cells, known, 0.125)
    generative_attention.backward(upstream, q, k, v, out, lse, cells, known, 0.125)
    plan = graph.block_plan(torch.arange(total + 1), torch.arange(total, dtype=torch.int32))
    graph.forward(q, k, v, plan, 0.125)
    graph.backward(upstream, q, k, v, out, lse, plan, 0.125)
    projection = torch.zeros(266, 64)
    favor_attention.forward(q, k, v, projection, cells, None, 1e-4)
    favor_attention.backward(upstream, q, k, v, projection, cells, torch.zeros(len(lengths)), False, 1e-4)
    ids = [torch.arange(total) % 50, torch.arange(total) % 7]
    tables = [torch.zeros(50, 256).bfloat16(), torch.zeros(7, 256).bfloat16()]
    weight, bias = torch.zeros(256).bfloat16(), torch.zeros(256).bfloat16()
    rows = torch.zeros(total, 256).bfloat16()
    _, mean, rstd = embed_norm.forward(ids, tables, rows, weight, bias, 1e-5)
    embed_norm.backward(rows, ids, tables, rows, weight, mean, rstd)
    genes, gene_bias = torch.zeros(20275, 256).bfloat16(), torch.zeros(20275).bfloat16()
    masked_head.forward(rows, genes, gene_bias, ids[0])
    masked_head.backward(torch.ones(total), rows, genes, gene_bias, ids[0], torch.zeros(total))


def main() -> None:
    triton.compiler.compile = _compile
    triton.runtime.driver.set_active(_Driver())
    for lengths in json.loads(sys.argv[1]):
        NOTES.append({"what": "pack", "lengths": lengths})
        run_every_operator(lengths)
    for note in NOTES:
        sys.stdout.write(json.dumps(note) + "\n")


if __name__ == "__main__":
    main()
