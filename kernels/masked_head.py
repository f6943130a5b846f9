"""Projection to the vocabulary and cross-entropy of the masked rows; logits are never in memory whole.

Forward: a program holds the logits of 128 rows and 128 genes at a time, keeps running maxima and sums over its share
of the vocabulary, and writes one log-sum-exp a row; shares are merged in their order. Backward: the gradients of the
logits are made again for some thousand genes at a time, in the storage dtype, and multiplied back into hidden and
weight at once: three products in all, where keeping none of them would make the logits again for every block of
columns of hidden. No atomics; a row's loss and gradient do not depend on the other rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import product
from .aot import Target
from .launch import Options, launch, new_output
from .product import accumulate, padded_rows, write_product

_SHARE = 2048  # genes of a forward's program: 20,275 genes and 10,000 rows make 790 programs
_MOST_GENES = 4096  # of the backward at once
_MOST_GRADIENTS = 1 << 25  # of logits at once: 64 MB in bfloat16
_GENE_STEP = 128
_ROWS_MERGED = 128
_MERGE_OPTIONS = Options(num_warps=4, num_stages=1)


def forward(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses in nats and the log-sum-exp of every row's logits, float32 (N,) each.

    hidden: (N, M); weight: (V, M); bias: (V,) or None; targets: int64 (N,). A target outside the vocabulary gives NaN.
    """
    hidden, weight = hidden.contiguous(), weight.contiguous()
    num_rows, vocab_size = len(hidden), len(weight)
    tiles = product.tiles(hidden.dtype)
    num_shares = triton.cdiv(vocab_size, _SHARE)
    shares = hidden.new_empty((num_shares, num_rows), dtype=torch.float32)
    losses, lse = (hidden.new_empty(num_rows, dtype=torch.float32) for _ in range(2))
    picked = losses.new_full((num_rows,), float("nan"))
    bias_or_any = hidden if bias is None else bias.contiguous()
    launch(
        head_logsumexp_kernel,
        (num_shares * triton.cdiv(num_rows, tiles.rows),),
        (hidden, weight, bias_or_any, targets.contiguous(), shares, picked, num_rows, vocab_size),
        {**_constants(hidden, bias), "SHARE": _SHARE},
        tiles.options,
    )
    launch(
        head_losses_kernel,
        (triton.cdiv(num_rows, _ROWS_MERGED),),
        (shares, picked, losses, lse, num_rows, num_shares),
        {"ROWS": _ROWS_MERGED},
        _MERGE_OPTIONS,
    )
    return losses, lse


def backward(
    grad_losses: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of hidden, weight and bias (None where there is none), in their dtypes; lse is the forward's."""
    hidden, weight, targets = hidden.contiguous(), weight.contiguous(), targets.contiguous()
    grad_losses, bias = grad_losses.contiguous(), None if bias is None else bias.contiguous()
    num_rows, vocab_size = len(hidden), len(weight)
    tiles = product.tiles(hidden.dtype)
    num_blocks = triton.cdiv(num_rows, tiles.rows)
    step = genes_at_once(num_rows, vocab_size)
    d_hidden = torch.zeros(hidden.shape, dtype=torch.float32, device=hidden.device)
    d_weight = new_output(weight)
    d_bias = None if bias is None else hidden.new_empty(vocab_size, dtype=torch.float32)
    d_logits = new_output(hidden, (padded_rows(num_rows, hidden.dtype), step))[:num_rows]
    bias_shares = hidden.new_empty((num_blocks, step if bias is not None else 0), dtype=torch.float32)
    for first in range(0, vocab_size, step):
        genes = slice(first, min(first + step, vocab_size))
        size = genes.stop - first
        own_bias = hidden if bias is None else bias[genes]
        launch(
            head_logit_grads_kernel,
            (num_blocks * triton.cdiv(size, tiles.columns),),
            (
                hidden,
                weight[genes],
                own_bias,
                targets,
                lse,
                grad_losses,
                d_logits,
                bias_shares,
                num_rows,
                size,
                first,
            ),
            {**_constants(hidden, bias), "STEP": step},
            tiles.options,
        )
        write_product(d_logits[:, :size], weight[genes], d_hidden, add=True)
        write_product(d_logits[:, :size].T, hidden, d_weight[genes])
        if d_bias is not None:
            d_bias[genes] = bias_shares[:, :size].sum(0)
    return (
        d_hidden.to(hidden.dtype),
        d_weight.to(weight.dtype),
        None if d_bias is None else d_bias.to(weight.dtype),
    )


def genes_at_once(num_rows: int, vocab_size: int) -> int:
    """How many genes' logits the backward makes again at a time: a multiple of 128, whatever the vocabulary."""
    fits = _MOST_GRADIENTS // max(num_rows, 1) // _GENE_STEP * _GENE_STEP
    needed = triton.cdiv(vocab_size, _GENE_STEP) * _GENE_STEP
    return int(min(max(fits, _GENE_STEP), _MOST_GENES, needed))


def _constants(hidden: Tensor, bias: Tensor | None) -> dict[str, Any]:
    tiles = product.tiles(hidden.dtype)
    return {
        **tiles.constants(hidden.dtype),
        "SIZE": hidden.shape[1],
        "EVEN": hidden.shape[1] % tiles.inner == 0,
        "HAS_BIAS": bias is not None,
    }


@triton.jit
def _logits(
    hidden_ptr, weight_ptr, bias_ptr, first_row, num_rows, first_gene, num_genes,
    SIZE: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    INNER: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits of ROWS rows and COLUMNS genes, at which hidden_ptr and weight_ptr begin, float32.

    Those of genes past the last are -infinity.
    """
    # Rows and genes past the end repeat the last one, which is no mask; inner is what is contiguous.
    rows = tl.minimum(tl.arange(0, ROWS), num_rows - 1 - first_row)
    columns = tl.minimum(tl.arange(0, COLUMNS), num_genes - 1 - first_gene)
    inner = tl.arange(0, INNER)
    acc = accumulate(
        tl.zeros((ROWS, COLUMNS), tl.float32),
        hidden_ptr + rows[:, None] * SIZE + inner[None, :],
        weight_ptr + columns[None, :] * SIZE + inner[:, None],
        INNER, INNER, SIZE, True, False, EVEN, INNER, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    genes = first_gene + tl.arange(0, COLUMNS)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + genes, mask=genes < num_genes, other=float("-inf")).to(tl.float32)
    else:
        bias = tl.where(genes < num_genes, 0.0, float("-inf"))
    return acc + bias[None, :]


@triton.jit(do_not_specialize=["num_rows", "vocab_size"])
def head_logsumexp_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, shares_ptr, picked_ptr, num_rows, vocab_size,
    SIZE: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, SHARE: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of ROWS rows over SHARE genes, and the logits of the targets among these.

    Neighbouring programs are the blocks of rows over one share, which then stays in the L2 cache.
    """
    num_blocks = tl.cdiv(num_rows, ROWS)
    first_row = tl.program_id(0) % num_blocks * ROWS
    begin = tl.program_id(0) // num_blocks * SHARE
    end = tl.minimum(begin + SHARE, vocab_size)
    rows = first_row + tl.arange(0, ROWS)
    row_ok = rows < num_rows
    target = tl.load(targets_ptr + rows, mask=row_ok, other=-1)
    hidden_ptr += first_row.to(tl.int64) * SIZE
    weight_ptr += begin.to(tl.int64) * SIZE
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    picked = tl.zeros((ROWS,), tl.float32)
    for first_gene in range(begin, end, COLUMNS):
        logits = _logits(
            hidden_ptr, weight_ptr, bias_ptr, first_row, num_rows, first_gene, vocab_size,
            SIZE, EVEN, HAS_BIAS, ROWS, COLUMNS, INNER, DOT_DTYPE, PRECISION,
        )  # fmt: skip
        is_target = target[:, None] == (first_gene + tl.arange(0, COLUMNS))[None, :]
        picked += tl.sum(tl.where(is_target, logits, 0.0), 1)
        new = tl.maximum(largest, tl.max(logits, 1))
        relative_to = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - relative_to) + tl.sum(tl.exp(logits - relative_to[:, None]), 1)
        largest = new
        weight_ptr += COLUMNS * SIZE
    share = (tl.program_id(0) // num_blocks).to(tl.int64)
    tl.store(shares_ptr + share * num_rows + rows, largest + tl.log(total), mask=row_ok)
    tl.store(picked_ptr + rows, picked, mask=row_ok & (target >= begin) & (target < end))


@triton.jit(do_not_specialize=["num_rows", "num_shares"])
def head_losses_kernel(
    shares_ptr, picked_ptr, losses_ptr, lse_ptr, num_rows, num_shares, ROWS: tl.constexpr
):  # fmt: skip
    """Merge the shares' log-sum-exps in their order; a loss is that less the target's logit."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_ok = rows < num_rows
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for _ in range(num_shares):
        share = tl.load(shares_ptr + rows, mask=row_ok, other=0.0)
        new = tl.maximum(largest, share)
        relative_to = tl.where(new == float("-inf"), 0.0, new)
        total = total * tl.exp(largest - relative_to) + tl.exp(share - relative_to)
        largest = new
        shares_ptr += num_rows
    lse = largest + tl.log(total)
    tl.store(lse_ptr + rows, lse, mask=row_ok)
    tl.store(losses_ptr + rows, lse - tl.load(picked_ptr + rows, mask=row_ok, other=0.0), mask=row_ok)


@triton.jit(do_not_specialize=["num_rows", "num_genes", "first"])
def head_logit_grads_kernel(
    hidden_ptr, weight_ptr, bias_ptr, targets_ptr, lse_ptr, grad_losses_ptr, d_logits_ptr, bias_shares_ptr,
    num_rows, num_genes, first,
    SIZE: tl.constexpr, EVEN: tl.constexpr, HAS_BIAS: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, INNER: tl.constexpr, DOT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(softmax - one-hot) * upstream of ROWS rows and COLUMNS genes, in rows of STEP; and its sums over the rows.

    Genes count from ``first``, where weight, bias and what is written begin.
    """
    num_blocks = tl.cdiv(num_rows, ROWS)
    block = tl.program_id(0) % num_blocks
    first_row = block * ROWS
    first_gene = tl.program_id(0) // num_blocks * COLUMNS
    rows = first_row + tl.arange(0, ROWS)
    genes = first_gene + tl.arange(0, COLUMNS)
    row_ok, gene_ok = rows < num_rows, genes < num_genes
    logits = _logits(
        hidden_ptr + first_row.to(tl.int64) * SIZE, weight_ptr + first_gene.to(tl.int64) * SIZE, bias_ptr,
        first_row, num_rows, first_gene, num_genes,
        SIZE, EVEN, HAS_BIAS, ROWS, COLUMNS, INNER, DOT_DTYPE, PRECISION,
    )  # fmt: skip
    lse = tl.load(lse_ptr + rows, mask=row_ok, other=float("inf"))
    upstream = tl.load(grad_losses_ptr + rows, mask=row_ok, other=0.0).to(tl.float32)
    target = tl.load(targets_ptr + rows, mask=row_ok, other=-1) - first
    p = tl.exp(logits - lse[:, None])
    grads = (p - tl.where(target[:, None] == genes[None, :], 1.0, 0.0)) * upstream[:, None]
    places = d_logits_ptr + rows.to(tl.int64)[:, None] * STEP + genes[None, :]
    tl.store(places, grads.to(d_logits_ptr.dtype.element_ty), mask=row_ok[:, None] & gene_ok[None, :])
    if HAS_BIAS:
        shares = bias_shares_ptr + block.to(tl.int64) * STEP + genes
        tl.store(shares, tl.sum(grads, 0), mask=gene_ok)


def aot_targets() -> list[Target]:
    """Geneformer's head: 768 wide with a bias."""
    tiles = product.tiles(torch.bfloat16)
    constants = tiles.constants(torch.bfloat16) | {"DOT_DTYPE": tl.bfloat16, "PRECISION": "ieee"}
    constants |= {"SIZE": 768, "EVEN": True, "HAS_BIAS": True}
    inputs = dict.fromkeys(("hidden_ptr", "weight_ptr", "bias_ptr"), "*bf16:16") | {"targets_ptr": "*i64:16"}
    rows = {"shares_ptr": "*fp32:16", "picked_ptr": "*fp32:16"}
    merged = rows | {"losses_ptr": "*fp32:16", "lse_ptr": "*fp32:16"}
    grads = {"lse_ptr": "*fp32:16", "grad_losses_ptr": "*fp32:16", "bias_shares_ptr": "*fp32:16"}
    grads |= {"d_logits_ptr": "*bf16:16"}
    sizes = {
        name: dict.fromkeys(name.split(), "i32") for name in ("num_rows vocab_size", "num_rows num_shares")
    }
    sizes["grads"] = dict.fromkeys(("num_rows", "num_genes", "first"), "i32")
    return [
        *product.aot_targets(),
        Target(
            "head_logsumexp 768 bf16",
            head_logsumexp_kernel,
            inputs | rows | sizes["num_rows vocab_size"],
            constants | {"SHARE": _SHARE},
            tiles.options,
        ),
        Target(
            "head_logit_grads 768 bf16",
            head_logit_grads_kernel,
            inputs | grads | sizes["grads"],
            constants | {"STEP": _MOST_GENES},
            tiles.options,
        ),
        Target(
            "head_losses",
            head_losses_kernel,
            merged | sizes["num_rows num_shares"],
            {"ROWS": _ROWS_MERGED},
            _MERGE_OPTIONS,
            multiplies=False,
        ),
    ]
