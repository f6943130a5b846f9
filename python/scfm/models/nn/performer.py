"""Performer's pre-norm block on packed cells, as scBERT and scFoundation's decoder have it.

    h = h + O favor(Q n(h), K n(h), V n(h));   h = h + W2 gelu(W1 n(h))

n is LayerNorm, or a variant of the original's constructor: ScaleNorm, or ReZero, which has no norm and scales the
branch instead. Heads may be wider than hidden_size / num_heads (scBERT: 10 heads of 64 in 200). The three projections
keep the authors' names and are multiplied as one. The residual stream stays in the dtype of the weights (float32;
float64 after ``.double()``), whatever dtype the products run in. Source: performer_pytorch in scBERT's released code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from scfm.models.nn.derived import Derived
from scfm.models.nn.encoder import by_rows
from scfm.models.nn.linear import Linear
from scfm.models.nn.linear_attention import generalized_attention, unprojected_attention
from scfm.models.nn.projections import default_num_features, draw_projection, next_projection
from scfm.ops import favor_attention
from scfm.ops.products import MIN_ROWS, fast_float32, row_stable_linear

REDRAW_INTERVAL = 1000
_ROWS_OF_PRODUCT = 4096

KmaxScope = Literal["cell", "batch"]
AttentionKind = Literal["favor", "generalized", "unprojected"]
NormKind = Literal["layer", "scale", "rezero"]


@dataclass(frozen=True)
class PerformerShape:
    """Sizes and variants of a stack of blocks; defaults are scBERT's.

    num_features: None for int(head_dim * ln head_dim), the original's default. attention: "favor", "generalized" (ReLU
    features) or "unprojected" (no_projection). glu: the feed-forward's inner half gates the other half. reversible: two
    streams, added at the end.
    """

    hidden_size: int
    num_heads: int
    num_layers: int
    head_dim: int = 64
    num_features: int | None = None
    ffn_mult: int = 4
    qkv_bias: bool = False
    attention: AttentionKind = "favor"
    norm: NormKind = "layer"
    glu: bool = False
    reversible: bool = False

    @property
    def features(self) -> int:
        return default_num_features(self.head_dim) if self.num_features is None else self.num_features


class ScaleNorm(nn.Module):
    """g x / |x|: one weight."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        normed: Tensor = x / length.clamp(min=self.eps) * self.g
        return normed


class ReZero(nn.Module):
    """The number that a branch is multiplied with; nothing is normalised."""

    def __init__(self) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.tensor(1e-3))


class InnerProjection(nn.Module):
    """Weight and optional bias of to_q, to_k or to_v; they are multiplied together, see PerformerAttention."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None


class PerformerAttention(nn.Module):
    """Projections, attention through random features (or a variant), and the way back to hidden_size."""

    projection_matrix: Tensor

    def __init__(self, shape: PerformerShape) -> None:
        super().__init__()
        self.kind = shape.attention
        self.num_heads, self.head_dim = shape.num_heads, shape.head_dim
        inner = shape.num_heads * shape.head_dim
        self.to_q = InnerProjection(shape.hidden_size, inner, bias=shape.qkv_bias)
        self.to_k = InnerProjection(shape.hidden_size, inner, bias=shape.qkv_bias)
        self.to_v = InnerProjection(shape.hidden_size, inner, bias=shape.qkv_bias)
        self.to_out = Linear(inner, shape.hidden_size)
        self.register_buffer("projection_matrix", torch.empty(shape.features, shape.head_dim))
        self._kept: tuple[torch.dtype, Derived, Derived] | None = None

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.to_out.compute_dtype

    def qkv_weights(self) -> tuple[Tensor, Tensor | None]:
        """[Wq; Wk; Wv] and the biases in ``compute_dtype``; kept where no gradient could need them."""
        parts = (self.to_q, self.to_k, self.to_v)
        weights: list[Tensor] = [part.weight for part in parts]
        biases: list[Tensor] = [part.bias for part in parts if part.bias is not None]
        dtype = self.compute_dtype
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*weights, *biases)):
            return torch.cat(weights).to(dtype), torch.cat(biases).to(dtype) if biases else None
        if self._kept is None or self._kept[0] != dtype:
            self._kept = (dtype, Derived(), Derived())
        _, weight, bias = self._kept
        joined = weight.of(weights, lambda: torch.cat(weights).to(dtype))
        return joined, bias.of(biases, lambda: torch.cat(biases).to(dtype)) if biases else None

    def qkv(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x: (T, hidden_size), normalised -> q, k, v: (T, H, D) in ``compute_dtype``."""
        return self.split(row_stable_linear(x, *self.qkv_weights()))

    def split(self, joined: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, 3 * H * D), as the joined product has them -> q, k, v: (T, H, D)."""
        q, k, v = joined.view(len(joined), 3, self.num_heads, self.head_dim).unbind(1)
        return q, k, v

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, kmax_scope: KmaxScope = "cell"
    ) -> Tensor:
        """(T, H, D) each -> the heads' outputs side by side, (T, H * D)."""
        if self.kind == "generalized":
            attended = generalized_attention(q, k, v, self.projection_matrix, cu_seqlens)
        elif self.kind == "unprojected":
            attended = unprojected_attention(q, k, v, cu_seqlens)
        else:
            attended = favor_attention(q, k, v, self.projection_matrix, cu_seqlens, kmax_scope=kmax_scope)
        return attended.flatten(1)


class FeedForward(nn.Module):
    """W2 gelu(W1 x), with the exact GELU; with ``glu`` W2 (gelu(a) * b), [a; b] = W1 x."""

    def __init__(self, hidden_size: int, ffn_mult: int, *, glu: bool) -> None:
        super().__init__()
        self.glu = glu
        inner = hidden_size * ffn_mult
        self.w1 = Linear(hidden_size, 2 * inner if glu else inner)
        self.w2 = Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.w1(x)
        if self.glu:
            gate, value = inner.chunk(2, dim=-1)
            inner = F.gelu(gate) * value
        else:
            inner = F.gelu(inner)
        out: Tensor = self.w2(inner)
        return out


class PerformerBlock(nn.Module):
    """One layer. hidden: (T, hidden_size) in the weights' dtype -> the same."""

    def __init__(self, shape: PerformerShape) -> None:
        super().__init__()
        self.attention_norm = _norm(shape)
        self.attention = PerformerAttention(shape)
        self.ffn_norm = _norm(shape)
        self.ffn = FeedForward(shape.hidden_size, shape.ffn_mult, glu=shape.glu)

    def forward(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        kmax_scope: KmaxScope = "cell",
        scratch: Tensor | None = None,
    ) -> Tensor:
        """scratch: (T, 3 * H * D) in ``compute_dtype``, written over; only where no gradient is kept."""
        if scratch is None:
            q, k, v = self.attention.qkv(self.normed(hidden))
        else:
            q, k, v = self.attention.split(self._qkv_into(scratch, hidden))
        return self.after_attention(hidden, self.attention.attend(q, k, v, cu_seqlens, kmax_scope))

    def _qkv_into(self, scratch: Tensor, hidden: Tensor) -> Tensor:
        weight, bias = self.attention.qkv_weights()
        for start in range(0, len(hidden), _ROWS_OF_PRODUCT):
            rows = slice(start, start + _ROWS_OF_PRODUCT)
            _linear_into(scratch[rows], self.normed(hidden[rows]).to(weight.dtype), weight, bias)
        return scratch

    def normed(self, hidden: Tensor) -> Tensor:
        """What the attention's projections are applied to."""
        return _apply(self.attention_norm, hidden)

    def after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """The block's output from its input and the heads' outputs (T, H * D)."""
        return by_rows(self._rows_after_attention, hidden, attended)

    def attention_branch(self, hidden: Tensor, cu_seqlens: Tensor, kmax_scope: KmaxScope = "cell") -> Tensor:
        """What attention adds to the residual stream."""
        attended = self.attention.attend(*self.attention.qkv(self.normed(hidden)), cu_seqlens, kmax_scope)
        return _scaled(self.attention_norm, self.attention.to_out(attended))

    def ffn_branch(self, hidden: Tensor) -> Tensor:
        """What the feed-forward adds to the residual stream."""
        return _scaled(self.ffn_norm, self.ffn(_apply(self.ffn_norm, hidden)))

    def _rows_after_attention(self, hidden: Tensor, attended: Tensor) -> Tensor:
        hidden = hidden + _scaled(self.attention_norm, self.attention.to_out(attended))
        return hidden + self.ffn_branch(hidden)


class Performer(nn.Module):
    """A stack of blocks and the count of training forwards since the projections were last drawn.

    In training every ``redraw_interval + 1``-th forward draws new projections first, as the original does (its counter
    is checked before it is raised). redraw_interval: None never to redraw. Each draw depends on ``redraw_seed``, the
    layer and the matrix that it replaces, so training that was interrupted draws the same ones.
    """

    calls_since_last_redraw: Tensor

    def __init__(self, shape: PerformerShape) -> None:
        super().__init__()
        self.shape = shape
        self.layers = nn.ModuleList(PerformerBlock(shape) for _ in range(shape.num_layers))
        self.register_buffer("calls_since_last_redraw", torch.tensor(0, dtype=torch.int64))
        self.redraw_interval: int | None = REDRAW_INTERVAL
        self.redraw_seed = 0

    def blocks(self) -> list[PerformerBlock]:
        return [block for block in self.layers if isinstance(block, PerformerBlock)]

    def forward(self, hidden: Tensor, cu_seqlens: Tensor, kmax_scope: KmaxScope = "cell") -> Tensor:
        """hidden: (T, hidden_size) -> the same, without the model's final norm."""
        return self.run(hidden, cu_seqlens, kmax_scope)[-1]

    def run(
        self,
        hidden: Tensor,
        cu_seqlens: Tensor,
        kmax_scope: KmaxScope = "cell",
        *,
        first: int = 0,
        num_layers: int | None = None,
        keep_states: bool = False,
    ) -> list[Tensor]:
        """States after layers ``first`` to ``num_layers``: the last, or all beginning with ``hidden``."""
        if self.training and first == 0:
            self.count_call()
        if self.shape.reversible:
            return self._run_reversible(hidden, cu_seqlens, kmax_scope, num_layers, keep_states)
        blocks = self.blocks()[first:num_layers]
        scratch = self._scratch(hidden) if blocks else None
        states = [hidden]
        del hidden
        for block in blocks:
            after = block(states[-1], cu_seqlens, kmax_scope, scratch)
            states = [*states, after] if keep_states else [after]
        return states

    def _scratch(self, hidden: Tensor) -> Tensor | None:
        """Memory for the blocks' queries, keys and values, one after the other's, where no gradient needs them.

        Fresh memory is paid for page by page as it is first written: at scBERT's length that is half of the product.
        """
        if torch.is_grad_enabled() or hidden.device.type != "cpu":
            return None
        inner = self.shape.num_heads * self.shape.head_dim
        return hidden.new_empty(len(hidden), 3 * inner, dtype=self.blocks()[0].attention.compute_dtype)

    def _run_reversible(
        self, hidden: Tensor, cu_seqlens: Tensor, scope: KmaxScope, num_layers: int | None, keep_states: bool
    ) -> list[Tensor]:
        """Two streams, both beginning with ``hidden``; a state is their sum, the first one ``hidden`` itself."""
        first, second = hidden, hidden
        states = [hidden]
        for block in self.blocks()[:num_layers]:
            first = first + block.attention_branch(second, cu_seqlens, scope)
            second = second + block.ffn_branch(first)
            states = [*states, first + second] if keep_states else [first + second]
        return states

    @torch.no_grad()
    def count_call(self) -> None:
        """One training forward: redraw if it is time, else count it."""
        if self.redraw_interval is None or self.shape.attention == "unprojected":
            return
        if int(self.calls_since_last_redraw) < self.redraw_interval:
            self.calls_since_last_redraw += 1
            return
        self.redraw()

    @torch.no_grad()
    def redraw(self) -> None:
        """New projections in every layer; the counter begins anew."""
        for number, block in enumerate(self.blocks()):
            matrix = block.attention.projection_matrix
            matrix.copy_(next_projection(matrix, seed=self.redraw_seed, layer=number))
        self.calls_since_last_redraw.zero_()

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, *, seed: int) -> None:
        """Fresh weights: torch's Linear, norms of 1, projections keyed by (seed, layer)."""
        for module in self.modules():
            if isinstance(module, InnerProjection | Linear):
                bound = module.weight.shape[1] ** -0.5
                module.weight.uniform_(-bound, bound, generator=generator)
                if module.bias is not None:
                    module.bias.uniform_(-bound, bound, generator=generator)
            elif isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ScaleNorm):
                module.g.fill_(1.0)
            elif isinstance(module, ReZero):
                module.g.fill_(1e-3)
        for number, block in enumerate(self.blocks()):
            matrix = block.attention.projection_matrix
            matrix.copy_(draw_projection(*matrix.shape, seed=seed, layer=number))
        self.calls_since_last_redraw.zero_()


def _linear_into(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """``row_stable_linear`` written to ``out``."""
    if len(x) < MIN_ROWS:
        out.copy_(row_stable_linear(x, weight, bias))
        return
    with fast_float32(x.device):
        if bias is None:
            torch.mm(x, weight.T, out=out)
        else:
            torch.addmm(bias, x, weight.T, out=out)


def _norm(shape: PerformerShape) -> nn.Module:
    if shape.norm == "layer":
        return nn.LayerNorm(shape.hidden_size, eps=1e-5)
    return ScaleNorm() if shape.norm == "scale" else ReZero()


def _apply(norm: nn.Module, x: Tensor) -> Tensor:
    if isinstance(norm, ReZero):
        return x
    normed: Tensor = norm(x)
    return normed


def _scaled(norm: nn.Module, branch: Tensor) -> Tensor:
    return branch * norm.g if isinstance(norm, ReZero) else branch
