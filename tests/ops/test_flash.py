"""Other people's packed attention, with stand-ins in their place: what they are given, and how their output is read."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from packs import heads, offsets

from scfm.ops import flash, triton_kernels, varlen_attention_reference

SCALE = 0.3


def attend(q, k, v, cells_q, cells_k, scale):
    """The reference, and the log-sum-exp as flash-attn gives it, (H, Tq)."""
    out = varlen_attention_reference(q, k, v, cells_k, scale=scale, cu_seqlens_q=cells_q)
    lse = torch.full((q.shape[1], len(q)), torch.inf)
    for cell in range(len(cells_q) - 1):
        queries, keys = (slice(*x[cell : cell + 2].tolist()) for x in (cells_q, cells_k))
        if keys.start < keys.stop:
            lse[:, queries] = torch.einsum("ihd,jhd->hij", q[queries], k[keys]).mul(scale).logsumexp(-1)
    return out, lse


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, object]]:
    """Stand-ins for all three libraries; each call's longest lengths and keywords."""
    seen: list[dict[str, object]] = []

    def note(name, longest, **keywords):
        seen.append({"name": name, "longest": longest, **keywords})

    def version_2(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        note("2", (max_seqlen_q, max_seqlen_k), probs=return_attn_probs)
        return (*attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale), None)

    def early_version_3(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale=None, num_splits=1
    ):  # fmt: skip
        note("3", (max_seqlen_q, max_seqlen_k), splits=num_splits)
        return attend(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale)

    def torchs(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux=None, scale=None,
        window_size=(-1, -1), num_splits=None,
    ):  # fmt: skip
        note("torch", (max_q, max_k), lse=return_aux.lse, splits=num_splits, window=window_size)
        return attend(query, key, value, cu_seq_q, cu_seq_k, scale)

    modules = {
        "flash_attn": {"flash_attn_varlen_func": version_2, "__version__": "2.8.3"},
        "flash_attn_interface": {"flash_attn_varlen_func": early_version_3},
        "torch.nn.attention.varlen": {
            "varlen_attn": torchs,
            "AuxRequest": lambda lse: SimpleNamespace(lse=lse),
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for function in (flash._function, flash._parameters, flash._too_old_version_2):
        function.cache_clear()
    yield seen
    for function in (flash._function, flash._parameters, flash._too_old_version_2):
        function.cache_clear()


@pytest.mark.parametrize("path", ["flash_attn_3", "flash_attn_2", "torch_varlen"])
@pytest.mark.parametrize("lengths", [[5, 0, 19], [2]], ids=str)
def test_output_and_log_sum_exp_are_read_right(calls, path, lengths) -> None:
    """Two tokens and two heads: the log-sum-exp looks the same either way round."""
    q, k, v, _ = heads(sum(lengths), num_heads=2, dtype=torch.float32)
    cells = offsets(lengths)
    out, lse = flash.forward(path, q, k, v, cells, cells, SCALE)
    want, natural = attend(q, k, v, cells, cells, SCALE)
    assert torch.equal(out, want) and torch.equal(lse, natural.T) and lse.is_contiguous()
    assert calls[0]["longest"] == (max(lengths), max(lengths))


def test_queries_have_offsets_of_their_own(calls) -> None:
    q, k, v, _ = heads(9, dtype=torch.float32)
    each, cells = offsets([1, 1]), offsets([4, 5])
    out, lse = flash.forward("flash_attn_2", q[:2], k, v, cells, each, SCALE)
    want, natural = attend(q[:2], k, v, each, cells, SCALE)
    assert torch.equal(out, want) and torch.equal(lse, natural.T)
    assert calls[0]["longest"] == (1, 5)


@pytest.mark.parametrize("lengths", [[], [0, 0]], ids=str)
def test_without_tokens_nobody_is_called(calls, lengths) -> None:
    q, k, v, _ = heads(0, dtype=torch.float32)
    cells = offsets(lengths)
    out, lse = flash.forward("torch_varlen", q, k, v, cells, cells, SCALE)
    assert out.shape == q.shape and lse.shape == (0, 2) and not calls


def test_what_each_is_asked_for(calls, monkeypatch) -> None:
    q, k, v, _ = heads(3, dtype=torch.float32)
    cells = offsets([3])
    for path in ("flash_attn_3", "flash_attn_2", "torch_varlen"):
        flash.forward(path, q, k, v, cells, cells, SCALE)
    assert calls[0] == {"name": "3", "longest": (3, 3), "splits": 1}
    assert calls[1] == {"name": "2", "longest": (3, 3), "probs": True}
    assert calls[2] == {"name": "torch", "longest": (3, 3), "lse": True, "splits": None, "window": (-1, -1)}
    # Where flash-attn 3 was put in the place of torch's kernel, keys are not to be split either.
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")
    flash.forward("torch_varlen", q, k, v, cells, cells, SCALE)
    assert calls[3]["splits"] == 1


def test_the_longest_cell_is_fetched_once(monkeypatch) -> None:
    cells = offsets([3, 9, 4])
    assert flash.longest_cell(cells) == 9
    fetched: list[int] = []
    diff = torch.Tensor.diff
    monkeypatch.setattr(torch.Tensor, "diff", lambda self: fetched.append(1) or diff(self))
    assert flash.longest_cell(cells) == 9 and not fetched
    cells[1] = 1
    assert flash.longest_cell(cells) == 11 and fetched
    assert flash.longest_cell(offsets([])) == 0
    with torch.inference_mode():
        assert flash.longest_cell(offsets([2, 5])) == 5


def test_slices_that_are_out_of_step_are_copied() -> None:
    """The kernels load 16 bytes at a time: 8 numbers of 16 bits."""
    packed = torch.zeros(7, 3, 2, 16, dtype=torch.bfloat16)
    q = packed.unbind(1)[1]
    assert flash._readable(q) is q
    for odd in (
        packed.flatten()[1:225].view(7, 2, 16),
        torch.zeros(7, 2, 20, dtype=torch.bfloat16)[..., 4:],
        q.mT,
    ):
        copied = flash._readable(odd)
        assert copied is not odd and copied.is_contiguous() and torch.equal(copied, odd)


class OnGpu:
    """As much of a GPU tensor as objections ask about."""

    def __init__(self, dtype=torch.bfloat16, head_dim=64) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda", 0), dtype, (1, 1, head_dim)

    def dim(self) -> int:
        return 3


@pytest.fixture
def hopper(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(triton_kernels, "missing", lambda: None)


@pytest.mark.usefixtures("hopper", "calls")
def test_objections_name_the_reason(monkeypatch) -> None:
    everyone = (flash.objection_version_3, flash.objection_version_2, flash.objection_torch)
    for objection in everyone:
        assert objection(OnGpu()) is None
        assert objection(OnGpu(torch.float32)) == "takes bfloat16 and float16 only"
        assert "not a multiple of 8" in (objection(OnGpu(head_dim=60)) or "")
        assert objection(torch.zeros(1, 1, 8)) == "computes on a GPU"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert all("compute capability 8.0" in (objection(OnGpu()) or "") for objection in everyone)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (10, 0))
    assert flash.objection_version_3(OnGpu()) == "made for Hopper (compute capability 9.x)"


@pytest.mark.usefixtures("hopper", "calls")
def test_other_versions_are_not_called(monkeypatch) -> None:
    def of_torch_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
        raise AssertionError

    monkeypatch.setattr(sys.modules["torch.nn.attention.varlen"], "varlen_attn", of_torch_2_10)
    assert flash.objection_torch(OnGpu()) == "needs torch 2.11 or later"
    monkeypatch.setattr(sys.modules["flash_attn"], "__version__", "2.5.9.post1")
    assert flash.objection_version_2(OnGpu()) == "flash-attn 2.5.9.post1 is older than 2.6"


@pytest.mark.usefixtures("hopper", "calls")
def test_a_folder_of_flash_attn_4_is_not_flash_attn_2(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    assert flash.objection_version_2(OnGpu()) == "not installed"
