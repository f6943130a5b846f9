"""From a user's call to the kernels, with the emulated module in the place of scfm._cuda."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cuda_emulator import Emulator
from emulated_module import EmulatedModule
from packs import check_as_exact_as_torch, gradients, heads, offsets

from scfm import GeneformerTokenizer
from scfm.errors import InvalidArgumentError, MissingDependencyError
from scfm.ops import (
    GeneGraph,
    GraphPlan,
    cuda_kernels,
    explain,
    graph_attention,
    graph_attention_reference,
    use_path,
)
from scfm.tokenize.rank_on_device import GeneTableOnDevice, RankOnDevice, rank_on_device


@pytest.fixture
def module(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> EmulatedModule:
    """The emulated module is used for tensors on the CPU."""
    emulated = EmulatedModule(emulator)
    monkeypatch.setattr(cuda_kernels, "module", lambda: emulated)
    monkeypatch.setattr(cuda_kernels, "stream_on", lambda device: nullcontext(0))
    monkeypatch.setattr(cuda_kernels, "objection", lambda tensor: None)
    monkeypatch.setattr("scfm.ops.paths._TABLE", _with_objections())
    return emulated


def _with_objections():
    """The table of paths, its CUDA path asking the patched function."""
    from scfm.ops import paths

    return {
        name: tuple(
            paths.Path(p.name, p.what, lambda tensor: cuda_kernels.objection(tensor))
            if p.name == "cuda"
            else p
            for p in listed
        )
        for name, listed in paths._TABLE.items()
    }


# ---- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [5, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_operator_forward_and_backward(module: EmulatedModule, dtype: torch.dtype, head_dim: int) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 40, (43,), generator=generator, dtype=torch.int32)
    edges = torch.randint(0, 40, (2, 200), generator=generator)
    plan = GeneGraph.from_edges(40, *edges, global_ids=[0]).plan(ids, offsets([30, 0, 13]))
    *inputs, upstream = heads(43, 2, head_dim, dtype=dtype)
    wide = [x.double() for x in inputs]

    def reference(*x):
        return graph_attention_reference(*x, plan)

    with use_path("graph_attention", "cuda"):
        out = graph_attention(*inputs, plan)
        ours = gradients(lambda *x: graph_attention(*x, plan), inputs, upstream)
    assert module.calls.count("graph_forward") == 2 and module.calls.count("graph_backward") == 1
    assert out.is_contiguous() and all(x.is_contiguous() for x in ours)
    check_as_exact_as_torch(out, reference(*inputs), reference(*wide))
    same = gradients(reference, inputs, upstream)
    for found, plain, exact in zip(ours, same, gradients(reference, wide, upstream.double()), strict=True):
        check_as_exact_as_torch(found, plain, exact, slack=2e-6)


def test_rows_that_begin_in_the_middle_of_a_vector_are_copied(module: EmulatedModule) -> None:
    plan = plan_of_all(6)
    packed = torch.randn(6, 3, 2, 9, generator=torch.Generator().manual_seed(0))
    q, k, v = (packed[:, i, :, 1:] for i in range(3))
    with use_path("graph_attention", "cuda"):
        found = graph_attention(q, k, v, plan)
    torch.testing.assert_close(found, graph_attention_reference(q, k, v, plan))


def plan_of_all(num_tokens: int) -> GraphPlan:
    starts = torch.arange(0, num_tokens**2 + 1, num_tokens)
    columns = torch.arange(num_tokens, dtype=torch.int32).repeat(num_tokens)
    return GraphPlan(starts, columns, starts.clone(), columns.clone())


@pytest.mark.parametrize(
    ("part", "place", "value", "message"),
    [
        ("row_offsets", 0, 1, "row_offsets must rise from 0 to 36"),
        ("row_offsets", 3, 1, "row_offsets must rise"),
        ("row_offsets", 6, 35, "row_offsets must rise from 0 to 36.*found 0 to 35"),
        ("columns", 20, 6, "columns run from 0 to 6; expected 0 to 5"),
        ("columns", 20, -1, "columns run from -1 to 5"),
    ],
)
def test_broken_plans_never_reach_a_kernel(module: EmulatedModule, part, place, value, message) -> None:
    plan = plan_of_all(6)
    getattr(plan, part)[place] = value
    q = torch.zeros(6, 1, 8)
    with use_path("graph_attention", "cuda"), pytest.raises(InvalidArgumentError, match=message):
        graph_attention(q, q, q, plan)
    assert module.calls == []


def test_a_plan_is_looked_at_once_and_again_when_it_has_changed(
    module: EmulatedModule, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, q = plan_of_all(6), torch.zeros(6, 1, 8)
    looks = []
    stack = torch.stack
    monkeypatch.setattr(torch, "stack", lambda x: looks.append(1) or stack(x))
    with use_path("graph_attention", "cuda"):
        for _ in range(3):
            graph_attention(q, q, q, plan)
        assert len(looks) == 1
        plan.columns[3] = 99
        with pytest.raises(InvalidArgumentError, match="columns run from 0 to 99"):
            graph_attention(q, q, q, plan)


def test_no_token_and_no_edge(module: EmulatedModule) -> None:
    none, empty = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    q = torch.zeros(0, 2, 8)
    with use_path("graph_attention", "cuda"):
        assert graph_attention(q, q, q, GraphPlan(none, empty, none, empty)).shape == (0, 2, 8)
        starts, q = torch.zeros(4, dtype=torch.int64), torch.ones(3, 2, 8)
        assert not graph_attention(q, q, q, GraphPlan(starts, empty, starts, empty)).any()


# ---- tokens ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"keep_counts": True, "stored_zeros": "drop", "max_tokens": 20}])
def test_a_tokenizer_on_a_device_gives_the_same_cells(module, tiny_vocab, tiny_adata, options) -> None:
    plain = GeneformerTokenizer(tiny_vocab, **options)
    device = GeneformerTokenizer(tiny_vocab, **options)
    device._rank_on_device = RankOnDevice("cpu")
    expected, found = plain(tiny_adata), device(tiny_adata)
    assert "rank_value" in module.calls
    for name in ("token_ids", "cu_seqlens", "cell_ids"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
    assert (found.values is None) == (expected.values is None)
    if expected.values is not None:
        assert torch.equal(found.values, expected.values)
    assert device.report == plain.report


def csr(device_type=torch.float32):
    indptr = torch.tensor([0, 3, 3, 5])
    indices = torch.tensor([0, 1, 4, 2, 3], dtype=torch.int32)
    return indptr, indices, torch.tensor([4, 2, 0, 1, 9]).to(device_type)


def table(arithmetic: str = "multiply64") -> GeneTableOnDevice:
    slots = np.array([0, 1, 2, -1, 3], np.int32)
    return GeneTableOnDevice.of(slots, np.arange(10, 14, dtype=np.int32), np.ones(4), 4, arithmetic, "cpu")


def test_tensors_on_a_device_become_tokens_there(module: EmulatedModule) -> None:
    found = rank_on_device(*csr(), table(), prefix_token=2, with_counts=True)
    assert found.token_ids.tolist() == [2, 10, 11, 13, 2, 12]
    assert found.cu_seqlens.tolist() == [0, 4, 4, 6] and found.num_gene_tokens.tolist() == [3, 0, 1]
    assert found.total_counts.tolist() == [6.0, 0.0, 10.0] and found.mapped_counts.tolist() == [6.0, 0.0, 1.0]
    assert found.counts is not None and found.counts[1:3].tolist() == [
        4 * (1 / 6) * 10_000,
        2 * (1 / 6) * 10_000,
    ]
    assert module.calls == ["check_rows", "row_sums", "rank_value"]


def test_broken_blocks_are_named_and_go_no_further(module: EmulatedModule) -> None:
    indptr, indices, data = csr()
    indices[4] = 5
    with pytest.raises(InvalidArgumentError, match=r"row 2: indices\[4\] = 5 is out of range for 5 genes"):
        rank_on_device(indptr, indices, data, table())
    indptr[2] = 1
    with pytest.raises(
        InvalidArgumentError, match=r"indptr\[2\] = 1 after 3; expected offsets that rise from 0 to 5"
    ):
        rank_on_device(indptr, indices, data, table())
    assert module.calls == ["check_rows", "check_rows"]


@pytest.mark.filterwarnings("error")
def test_arrays_that_may_not_be_written_are_taken(module: EmulatedModule) -> None:
    arrays = [x.numpy() for x in csr()]
    for array in arrays:
        array.flags.writeable = False
    slots = (np.array([0, 1, 2, -1, 3], np.int32), np.arange(10, 14, dtype=np.int32), np.ones(4))
    found = RankOnDevice("cpu")(*arrays, np.ones(3), *slots, 4, "multiply64", True, -1, -1, -1, False)
    assert found.token_ids.tolist() == [10, 11, 13, 12]


def test_a_table_is_copied_once_for_each_plan(module: EmulatedModule) -> None:
    indptr, indices, data = (x.numpy() for x in csr())
    slots = (np.array([0, 1, 2, -1, 3], np.int32), np.arange(10, 14, dtype=np.int32), np.ones(4))
    rank = RankOnDevice("cpu")
    for _ in range(3):
        rank(indptr, indices, data, np.ones(3), *slots, 4, "multiply64", True, -1, -1, -1, False)
    assert len(rank._tables) == 1
    for _ in range(40):
        rank(
            indptr,
            indices,
            data,
            np.ones(3),
            slots[0].copy(),
            *slots[1:],
            4,
            "multiply64",
            True,
            -1,
            -1,
            -1,
            False,
        )
    assert len(rank._tables) <= 16


# ---- without a GPU --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused_with_a_reason(tiny_vocab) -> None:
    with pytest.raises(MissingDependencyError, match="cannot be ranked on cuda: torch sees no GPU"):
        GeneformerTokenizer(tiny_vocab, device="cuda")
    assert GeneformerTokenizer(tiny_vocab, device="cpu")._rank_on_device is None


@dataclass
class OnGpu:
    """As much of a tensor on a GPU as an objection looks at."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (1, 1, 64)
    device = torch.device("cuda", 0)

    def dim(self) -> int:
        return len(self.shape)


@pytest.mark.parametrize(
    ("tensor", "capability", "reason"),
    [
        (torch.zeros(1, 1, 8), (9, 0), "computes on a GPU"),
        (OnGpu(torch.float64), (9, 0), "has no float64"),
        (OnGpu(shape=(1, 1, 257)), (9, 0), "head_dim 257 is above 256"),
        (OnGpu(), (7, 5), "needs compute capability 8.0 or later"),
        (OnGpu(), (9, 0), "the answer of missing"),
    ],
)
def test_objections_in_words(monkeypatch: pytest.MonkeyPatch, tensor, capability, reason) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cuda_kernels, "missing", lambda: "the answer of missing")
    assert cuda_kernels.objection(tensor) == reason


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'scfm._cuda'"), "the CUDA module is not built"),
        (ImportError("wrong ELF class"), "the CUDA module cannot be loaded (wrong ELF class)"),
        (None, "no GPU, or its driver is too old for CUDA 13.0"),
    ],
)
def test_why_the_module_cannot_be_used(monkeypatch: pytest.MonkeyPatch, error, reason) -> None:
    def module() -> SimpleNamespace:
        if error is not None:
            raise error
        return SimpleNamespace(device_count=lambda: 0, runtime_version=lambda: (13, 0))

    monkeypatch.setattr(cuda_kernels, "module", module)
    assert cuda_kernels.missing.__wrapped__() == reason


def test_the_table_of_paths_says_why() -> None:
    verdicts = {v.path: v for v in explain("graph_attention", torch.zeros(1, 1, 8))}
    assert verdicts["cuda"].why == "computes on a GPU" and not verdicts["cuda"].chosen
