"""What stands before and after the encoder, beside torch: embed_norm, masked_head_loss, and what a small call costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from attention import Run
from contenders import random_pack
from rows import Contender, Row, Subject, measure
from torch import Tensor

from scfm import ops
from scfm.ops import paths
from shapes import GENEFORMER, SCGPT, V2_104M

_TOKENS = 32_768
_MASKED = 0.15  # of the tokens


def embed_norm(run: Run) -> Iterator[Row]:
    """Gene, type and position tables of Geneformer; gene table and value projection of scGPT."""
    tokens = 24 if run.tiny else _TOKENS
    sizes = (
        (GENEFORMER, [V2_104M.vocab_size, 2, V2_104M.max_tokens], False),
        (SCGPT, [SCGPT.vocab_size], True),
    )
    for shape, rows, has_addend in sizes:
        generator = torch.Generator().manual_seed(0)
        rows = [min(n, 50) for n in rows] if run.tiny else rows
        ids = [torch.randint(n, (tokens,), generator=generator).to(run.device) for n in rows]
        shapes = [*((n, shape.hidden_size) for n in rows), *[(tokens, shape.hidden_size)] * has_addend]
        shapes += [(shape.hidden_size,)] * 2
        inputs = tuple(torch.randn(s, generator=generator).to(run.device, torch.bfloat16) for s in shapes)

        def ours(*given: Tensor, ids: list[Tensor] = ids, has_addend: bool = has_addend) -> Tensor:
            addend = given[len(ids)] if has_addend else None
            return ops.embed_norm(ids, given[: len(ids)], *given[-2:], addend=addend, eps=1e-12)

        def theirs(*given: Tensor, ids: list[Tensor] = ids) -> Tensor:
            x = sum((F.embedding(i, table) for i, table in zip(ids, given, strict=False)), start=0)
            x = x if len(given) == len(ids) + 2 else x + given[len(ids)]
            return F.layer_norm(x, x.shape[-1:], *given[-2:], eps=1e-12)

        # Rows read of every table (and the addend), and the rows written.
        moved = (len(rows) + has_addend + 1) * tokens * shape.hidden_size * 2 / 1e9
        subject = Subject(
            "embed_norm", f"{shape.name} {tokens:,} tokens", "bfloat16", moved, "GB/s", backward=2.0
        )
        yield from _beside_torch(subject, inputs, ours, theirs, run)


def masked_head_loss(run: Run) -> Iterator[Row]:
    """Geneformer's head on 15 % of the tokens: projection to the vocabulary and cross-entropy."""
    rows, size, vocab = (
        (9, 32, 50) if run.tiny else (int(_MASKED * _TOKENS), GENEFORMER.hidden_size, GENEFORMER.vocab_size)
    )
    generator = torch.Generator().manual_seed(0)
    shapes = ((rows, size), (vocab, size), (vocab,))
    inputs = tuple(
        (torch.randn(s, generator=generator) / size**0.25).to(run.device, torch.bfloat16) for s in shapes
    )
    targets = torch.randint(vocab, (rows,), generator=generator).to(run.device)
    subject = Subject(
        "masked_head_loss",
        f"{GENEFORMER.name} {rows:,} rows of {vocab:,} genes",
        "bfloat16",
        2 * rows * size * vocab / 1e12,
        backward=2.0,
    )

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ops.masked_head_loss(hidden, weight, bias, targets)

    def theirs(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight, bias), targets, reduction="none")

    yield from _beside_torch(subject, inputs, ours, theirs, run)


def _beside_torch(
    subject: Subject,
    inputs: tuple[Tensor, ...],
    ours: Callable[..., Tensor],
    theirs: Callable[..., Tensor],
    run: Run,
) -> Iterator[Row]:
    contenders = []
    for path in paths.table(subject.operator):
        if path.name == "torch" or (run.device == "cuda" and path.name == "native"):
            continue
        forced = partial(ops.use_path, subject.operator, path.name)
        why = path.objection(inputs[0])
        contenders.append(
            Contender(f"scfm {path.name}", inputs, {"": ours}, absent=why, is_ours=True, around=forced)
        )
    ways: dict[str, Callable[..., Tensor]] = {"eager": theirs}
    if run.device == "cuda":
        ways["compiled"] = torch.compile(theirs, dynamic=False)
    yield from measure(subject, [*contenders, Contender("torch", inputs, ways)], run.clock, run.peaks)


def small_calls(run: Run) -> Iterator[Row]:
    """Time of the CPU to queue one call on one cell of 64 tokens: what a model pays a layer, whatever its size."""
    pack = random_pack([64], 1 if run.tiny else GENEFORMER.num_heads, 64, torch.bfloat16, run.device)
    cells = pack.cu_seqlens
    table = torch.randn(64, 768, device=run.device, dtype=torch.bfloat16)
    ids, norm = torch.arange(64, device=run.device), torch.ones(768, device=run.device, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {
        "scfm varlen_attention": lambda: ops.varlen_attention(*pack.qkv, cells),
        "torch SDPA": lambda: F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in pack.qkv)),
        "scfm embed_norm": lambda: ops.embed_norm([ids], [table], norm, norm),
        "torch embedding and layer_norm": lambda: F.layer_norm(F.embedding(ids, table), (768,), norm, norm),
    }
    print("\nA call on 64 tokens, time of the CPU to queue it")
    for name, call in calls.items():
        with torch.no_grad():
            microseconds = run.clock.microseconds_to_queue(call)
        print(f"  {name:<38} {microseconds:9.1f} us")
        yield Row("queueing a call", "64 tokens", "bfloat16", name, "forward", microseconds / 1e3)
