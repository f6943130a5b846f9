"""Attention at the shapes of the released models, ours beside every peer that runs here. A function a section."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import contenders
import torch
from contenders import Pack, random_pack
from rows import BACKWARD, FORWARD, Contender, Row, Subject, measure
from timing import Clock, Peaks
from torch import Tensor

from attention_peers import performer
from scfm import ops
from shapes import GENEFORMER, GRAPH_GENES, GRAPH_NEIGHBORS, SCBERT, SCGPT, EncoderShape, cell_lengths

_TOKENS = 32_768  # of a call: enough to fill a GPU, as a model's batch does
GOAL_FORWARD, GOAL_BACKWARD = 400.0, 300.0  # TFLOP/s on an H200 at 2,000 tokens, head_dim 64


@dataclass(frozen=True)
class Run:
    """What every section is given; tiny: the dry run's shapes."""

    clock: Clock
    peaks: Peaks
    tiny: bool

    @property
    def device(self) -> str:
        return self.clock.device


def varlen(run: Run) -> Iterator[Row]:
    """Full attention: cells of one length and of an atlas's lengths, in bfloat16; float16 at one shape."""
    for shape, title, lengths, dtype in _packs(run):
        pack = random_pack(lengths, shape.num_heads, shape.head_dim, dtype, run.device)
        cells = pack.cu_seqlens
        goals = {FORWARD: GOAL_FORWARD, BACKWARD: GOAL_BACKWARD} if "2,000" in title else {}
        subject = Subject(
            "varlen_attention", f"{shape.name} {title}", _name(dtype), _tflop(pack, pack.pairs), goals=goals
        )
        own = contenders.ours(
            "varlen_attention", pack, lambda q, k, v, c=cells: ops.varlen_attention(q, k, v, c)
        )
        peers = [contenders.padded_peer(pack), *contenders.packed_peers(pack), contenders.flex_peer(pack)]
        yield from measure(subject, [*own, *peers], run.clock, run.peaks)


def _packs(run: Run) -> Iterator[tuple[EncoderShape, str, list[int], torch.dtype]]:
    if run.tiny:
        yield _one_head(GENEFORMER), "lengths of an atlas", [5, 19, 12], torch.bfloat16
        yield _one_head(SCGPT), "16 tokens", [16, 16], torch.bfloat16
        return
    atlas = cell_lengths(_TOKENS // GENEFORMER.num_tokens, mean=GENEFORMER.num_tokens).tolist()
    yield GENEFORMER, "2,000 tokens", [2000] * 16, torch.bfloat16
    yield GENEFORMER, "2,000 tokens", [2000] * 16, torch.float16
    yield GENEFORMER, "mean 2,000, lengths of an atlas", atlas, torch.bfloat16
    yield GENEFORMER, "4,096 tokens", [4096] * 8, torch.bfloat16
    yield SCGPT, "1,200 tokens", [1200] * 27, torch.bfloat16
    yield SCGPT, "200 tokens", [200] * 160, torch.bfloat16


def generative(run: Run) -> Iterator[Row]:
    """scGPT's known/unknown mask, half of a cell's genes known. The peers are given it as a mask."""
    num_cells, length = (2, 12) if run.tiny else (27, SCGPT.num_tokens)
    shape, num_known = _one_head(SCGPT) if run.tiny else SCGPT, length // 2
    pack = random_pack([length] * num_cells, shape.num_heads, shape.head_dim, torch.bfloat16, run.device)
    cells = pack.cu_seqlens
    known = torch.full((num_cells,), num_known, dtype=torch.int32, device=run.device)
    place = torch.arange(sum(pack.lengths), device=run.device) % length

    def seen(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (place[key] < num_known) | (query == key)

    mask = torch.eye(length, dtype=torch.bool, device=run.device)
    mask[:, :num_known] = True
    mask = mask.expand(num_cells, 1, length, length)
    pairs = num_cells * (length * num_known + length - num_known)
    subject = Subject(
        "generative_attention",
        f"{SCGPT.name} {length:,} tokens, half known",
        "bfloat16",
        _tflop(pack, pairs),
    )
    own = contenders.ours(
        "generative_attention", pack, lambda q, k, v: ops.generative_attention(q, k, v, cells, known)
    )
    peers = [contenders.dense_peer(pack, mask), contenders.flex_peer(pack, seen)]
    yield from measure(subject, [*own, *peers], run.clock, run.peaks)


def graph(run: Run) -> Iterator[Row]:
    """A gene sees its neighbours in a random graph, itself and <cls>; rates count the pairs that are seen."""
    num_cells, genes, neighbors = (2, 40, 4) if run.tiny else (8, GRAPH_GENES, GRAPH_NEIGHBORS)
    generator = torch.Generator().manual_seed(0)
    vocabulary = 10 * genes
    source = torch.arange(vocabulary).repeat_interleave(10 * neighbors)  # of which a cell expresses a tenth
    target = torch.randint(vocabulary, source.shape, generator=generator)
    network = ops.GeneGraph.from_edges(vocabulary, source, target, global_ids=[0])
    ids = [
        torch.cat(
            [
                torch.zeros(1, dtype=torch.int64),
                1 + torch.randperm(vocabulary - 1, generator=generator)[: genes - 1],
            ]
        )
        for _ in range(num_cells)
    ]
    shape = _one_head(GENEFORMER) if run.tiny else GENEFORMER
    pack = random_pack([genes] * num_cells, shape.num_heads, shape.head_dim, torch.bfloat16, run.device)
    plan = network.plan(torch.cat(ids).to(run.device, torch.int32), pack.cu_seqlens)
    seen = plan.dense_mask()
    own_cells = torch.stack([seen[i : i + genes, i : i + genes] for i in range(0, len(seen), genes)])
    subject = Subject(
        "graph_attention",
        f"{GENEFORMER.name} {genes:,} genes, {neighbors} neighbours",
        "bfloat16",
        _tflop(pack, plan.num_edges),
    )
    own = contenders.ours("graph_attention", pack, lambda q, k, v: ops.graph_attention(q, k, v, plan))
    peers = [
        contenders.dense_peer(pack, own_cells[:, None]),
        contenders.flex_peer(pack, lambda b, h, query, key: seen[query, key]),
    ]
    yield from measure(subject, [*own, *peers], run.clock, run.peaks)


def favor(run: Run) -> Iterator[Row]:
    """FAVOR+ at scBERT's shape. The peer holds its feature maps in memory, as Performer's code does."""
    length, features = (48, 20) if run.tiny else (SCBERT.num_tokens, SCBERT.num_features)
    shape = _one_head(SCBERT) if run.tiny else SCBERT
    projection = torch.randn(features, shape.head_dim, generator=torch.Generator().manual_seed(0))
    projection = projection.to(run.device)
    for dtype in (torch.bfloat16,) if run.tiny else (torch.bfloat16, torch.float32):
        pack = random_pack([length] * 2, shape.num_heads, shape.head_dim, dtype, run.device)
        cells = pack.cu_seqlens
        # Feature maps of queries and keys, the context, and the mixing of it: 2 T F D H each.
        work = 4 * 2 * sum(pack.lengths) * features * shape.head_dim * shape.num_heads / 1e12
        subject = Subject(
            "favor_attention",
            f"{SCBERT.name} {length:,} tokens, {features} features",
            _name(dtype),
            work,
            backward=2.0,
        )
        own = contenders.ours(
            "favor_attention",
            pack,
            lambda q, k, v, c=cells: ops.favor_attention(q, k, v, projection, c, kmax_scope="batch"),
        )
        yield from measure(subject, [*own, _performer(pack, projection.to(dtype))], run.clock, run.peaks)


def _performer(pack: Pack, projection: Tensor) -> Contender:
    length = pack.lengths[0]
    inputs = tuple(x.view(-1, length, *x.shape[1:]).transpose(1, 2).contiguous() for x in pack.qkv)
    ways = {"eager": lambda q, k, v: performer(q, k, v, projection)}
    if pack.q.is_cuda:
        compiled = torch.compile(performer, dynamic=False)
        ways["compiled"] = lambda q, k, v: compiled(q, k, v, projection)
    return Contender("Performer's formula", inputs, ways, lambda out: out.transpose(1, 2).flatten(0, 1))


def _tflop(pack: Pack, pairs: int) -> float:
    """Two products of 2 x head_dim operations for every pair of every head."""
    return 4 * pairs * pack.q.shape[1] * pack.q.shape[2] / 1e12


def _one_head(shape: EncoderShape) -> EncoderShape:
    """For the interpreter, which takes a tenth of a second for every program of a kernel."""
    return replace(shape, num_heads=1, head_dim=16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
