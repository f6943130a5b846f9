"""End to end, in cells a second: tokens in GPU memory to embeddings, at the shapes of Geneformer-104M and scGPT.

Weights are random, which costs what trained ones cost. scfm's own blocks are used (embed_norm, EncoderLayer); where
the whole Geneformer can be imported (it needs pandas) it is timed too, through its own embed. The peer is torch's
TransformerEncoder in the same precision, on padded batches of cells sorted by length, with its fused inference path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from attention import Run
from rows import Row
from torch import Tensor, nn

from scfm.models.nn.encoder import EncoderLayer
from scfm.models.nn.linear import Linear
from scfm.models.pooling import mean_of_genes
from scfm.ops import embed_norm
from shapes import GENEFORMER, SCGPT, V2_104M, EncoderShape, cell_lengths

GOALS = {GENEFORMER.name: 1000.0, SCGPT.name: 5000.0}  # cells/s on an H200
_PEER_BATCHES = (8, 32)
_LONGEST = 4096
Calls = list[Callable[[], object]]


class PackedEncoder(nn.Module):
    """Embedding with positions, then post-norm layers on packed cells; the mean over a cell's tokens comes out."""

    def __init__(self, shape: EncoderShape, activation: str) -> None:
        super().__init__()
        size = shape.hidden_size
        self.gene_table = nn.Parameter(torch.randn(shape.vocab_size, size) * 0.02)
        self.position_table = nn.Parameter(torch.randn(_LONGEST, size) * 0.02)
        self.norm = nn.LayerNorm(size)
        self.layers = nn.ModuleList(
            EncoderLayer(size, shape.num_heads, shape.ffn_size, activation=activation)
            for _ in range(shape.num_layers)
        )
        for module in self.modules():
            if isinstance(module, Linear):
                nn.init.normal_(module.weight, std=0.02)
                module.compute_dtype = torch.bfloat16

    def forward(self, token_ids: Tensor, positions: Tensor, cu_seqlens: Tensor) -> Tensor:
        norm = self.norm
        hidden = embed_norm(
            [token_ids, positions],
            [self.gene_table, self.position_table],
            norm.weight,
            norm.bias,
            eps=norm.eps,
        )
        for layer in self.layers:
            hidden = layer(hidden, cu_seqlens)
        return mean_of_genes(hidden, cu_seqlens, leading=0, trailing=0)


class PaddedEncoder(nn.Module):
    """The same by torch's TransformerEncoder."""

    def __init__(self, shape: EncoderShape, activation: str) -> None:
        super().__init__()
        size = shape.hidden_size
        self.gene_table, self.position_table = (
            nn.Embedding(shape.vocab_size, size),
            nn.Embedding(_LONGEST, size),
        )
        self.norm = nn.LayerNorm(size)
        layer = nn.TransformerEncoderLayer(
            size, shape.num_heads, shape.ffn_size, activation=activation, batch_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, shape.num_layers)

    def forward(self, token_ids: Tensor, absent: Tensor | None) -> Tensor:
        places = torch.arange(token_ids.shape[1], device=token_ids.device)
        hidden = self.norm(self.gene_table(token_ids) + self.position_table(places))
        hidden = self.encoder(hidden, src_key_padding_mask=absent)
        if absent is None:
            return hidden.mean(1)
        there = ~absent[:, : hidden.shape[1], None]
        return (hidden * there).sum(1) / there.sum(1)


def cells_per_second(run: Run) -> Iterator[Row]:
    for shape, activation in ((GENEFORMER, "relu"), (SCGPT, "relu")):
        if run.tiny:
            shape = replace(shape, num_layers=2, hidden_size=32, num_heads=2, ffn_size=64, vocab_size=50)
            lengths = [5, 19, 12] if shape.name == GENEFORMER.name else [16, 16]
        elif shape.name == GENEFORMER.name:
            lengths = cell_lengths(32, mean=shape.num_tokens, longest=_LONGEST).tolist()
        else:
            lengths = [shape.num_tokens] * 128
        mean = sum(lengths) / len(lengths)
        print(f"\nEmbedding cells, {shape.name}, mean {mean:,.0f} tokens, bfloat16 products")
        ids = [torch.randint(shape.vocab_size, (n,), device=run.device) for n in lengths]
        rates = {
            name: _best_rate(partial(prepare, shape, activation, ids, run), len(ids), run)
            for name, prepare in (
                ("scfm", _packed_calls),
                ("scfm, whole model", _whole_model_calls),
                ("torch TransformerEncoder, padded", _padded_calls),
            )
        }
        yield from _rows(shape, mean, rates)


def _best_rate(prepare: Callable[[], Calls], num_cells: int, run: Run) -> float | str:
    """Cells a second of the fastest call, or why there is none."""
    rates, said = [], ""
    with torch.no_grad():
        try:
            calls = prepare()
        except Exception as error:
            return _first_line(error)
        for call in calls:
            try:
                rates.append(num_cells / run.clock.sustained(call) * 1e3)
            except Exception as error:
                said = _first_line(error)
    return max(rates) if rates else said


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _rows(shape: EncoderShape, mean: float, rates: dict[str, float | str]) -> Iterator[Row]:
    ours = rates["scfm"]
    for name, rate in rates.items():
        what = ("embedding", f"{shape.name} mean {mean:,.0f} tokens", "bfloat16", name)
        if isinstance(rate, str):
            row = Row(*what, "", absent=rate)
            print(f"  {name:<38} absent: {rate}")
        else:
            ratio = ours / rate if isinstance(ours, float) else None
            goal = GOALS[shape.name] if name.startswith("scfm") else None
            row = Row(*what, "forward", rate=round(rate, 1), unit="cells/s", ratio=ratio, goal=goal)
            shown = f"{ratio:6.2f}x" if ratio else ""
            print(f"  {name:<38} {rate:10.1f} cells/s {shown}" + (f"   goal {goal:,.0f}" if goal else ""))
        yield row


def _packed_calls(shape: EncoderShape, activation: str, ids: list[Tensor], run: Run) -> Calls:
    model = PackedEncoder(shape, activation).to(run.device).eval()
    lengths = torch.tensor([len(x) for x in ids])
    cells = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(run.device, torch.int32)
    positions = torch.cat([torch.arange(len(x)) for x in ids]).to(run.device)
    tokens = torch.cat(ids).to(torch.int32)
    return [lambda: model(tokens, positions, cells)]


def _whole_model_calls(shape: EncoderShape, activation: str, ids: list[Tensor], run: Run) -> Calls:
    """Geneformer's own embed, its authors' defaults: <cls>, second to last layer; from CPU tensors to a numpy array."""
    if shape.name != GENEFORMER.name:
        raise NotImplementedError("the row above is the whole of it")
    from scfm.data.packed import PackedCells
    from scfm.models.geneformer.model import Geneformer

    config = replace(V2_104M, num_layers=shape.num_layers, vocab_size=shape.vocab_size)
    model = Geneformer.from_config(config).to(run.device)
    model.version = "V2"
    model.set_compute_dtype("bfloat16")
    packed = PackedCells.from_lists([x.tolist() for x in ids])
    return [lambda: model.embed(packed)]


def _padded_calls(shape: EncoderShape, activation: str, ids: list[Tensor], run: Run) -> Calls:
    """Every batch size that is offered, plainly (torch's fused layers) and compiled; of one length without a mask."""
    model = PaddedEncoder(shape, activation).to(run.device, torch.bfloat16).eval()
    by_length = sorted(ids, key=len, reverse=True)

    def batches(size: int) -> list[tuple[Tensor, Tensor | None]]:
        found = []
        for start in range(0, len(by_length), size):
            cells = by_length[start : start + size]
            padded = nn.utils.rnn.pad_sequence(cells, batch_first=True)
            lengths = torch.tensor([len(x) for x in cells], device=run.device)
            absent = torch.arange(padded.shape[1], device=run.device) >= lengths[:, None]
            found.append((padded, absent if bool(absent.any()) else None))
        return found

    def run_all(encode: Callable[..., Tensor], prepared: list[tuple[Tensor, Tensor | None]]) -> list[Tensor]:
        return [encode(*batch) for batch in prepared]

    ways: list[Callable[..., Tensor]] = [model]
    if run.device == "cuda":
        ways.append(torch.compile(model, dynamic=None if len({len(x) for x in ids}) == 1 else True))
    return [partial(run_all, way, batches(size)) for way in ways for size in _PEER_BATCHES]
