"""scfm._cuda on a machine without a driver: it imports, has no device, and refuses in words."""

from __future__ import annotations

import ast
import ctypes
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from scfm.errors import InvalidArgumentError, ScfmError

cuda = pytest.importorskip("scfm._cuda", reason="the CUDA module is not built", exc_type=ImportError)
STUB = Path(__file__).parents[2] / "python" / "scfm" / "_cuda.pyi"
without_a_gpu = pytest.mark.skipif(cuda.device_count() > 0, reason="this machine has a GPU")


def heads(tokens: int = 3, num_heads: int = 2, head_dim: int = 8, dtype: torch.dtype = torch.float32):
    return torch.zeros(tokens, num_heads, head_dim, dtype=dtype)


def forward_arguments(**changed):
    arguments = {name: heads() for name in ("q", "k", "v", "out")}
    arguments |= {
        "lse": torch.zeros(3, 2),
        "row_offsets": torch.zeros(4, dtype=torch.int64),
        "columns": torch.zeros(0, dtype=torch.int32),
        "scale": 1.0,
        "stream": 0,
    }
    return {**arguments, **changed}


def test_the_stub_names_what_there_is() -> None:
    tree = ast.parse(STUB.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    in_module = {name for name in dir(cuda) if not name.startswith("__")}
    assert in_module == functions.keys() | {"CudaError"}
    for name, node in functions.items():
        signature = (getattr(cuda, name).__doc__ or "").splitlines()[0]
        assert re.findall(r"(\w+): ", signature) == [argument.arg for argument in node.args.args], name


@without_a_gpu
def test_without_a_driver_there_is_no_device() -> None:
    assert cuda.device_count() == 0
    with pytest.raises(cuda.CudaError, match=r"device_name: .*cudaError") as caught:
        cuda.device_name(0)
    assert isinstance(caught.value, ScfmError) and caught.value.code == "cuda"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"q": 3}, "q is a int, expected a tensor"),
        ({"q": heads().double()}, "q is float64, expected float32, float16 or bfloat16"),
        ({"q": heads()[0]}, r"q has shape \(2, 8\), expected \(tokens, heads, head_dim\)"),
        ({"q": heads(head_dim=7)}, "q has head_dim 7, expected a multiple of 4 up to 256"),
        ({"q": heads(head_dim=260)}, "q has head_dim 260, expected a multiple of 4 up to 256"),
        ({"q": heads(head_dim=4, dtype=torch.float16)}, "q has head_dim 4, expected a multiple of 8"),
        ({"q": heads(num_heads=65536, head_dim=4)}, "q has 65536 heads, expected at most 65535"),
        ({"k": heads(tokens=4)}, r"k is float32 \(4, 2, 8\), expected \(3, 2, 8\)"),
        ({"v": heads(dtype=torch.bfloat16)}, r"v is bfloat16 \(3, 2, 8\), expected \(3, 2, 8\) of the first"),
        (
            {"out": heads(head_dim=9)[..., 1:]},
            "out: rows of 8 must be contiguous and begin at multiples of 16",
        ),
        ({"k": torch.zeros(3, 8, 2).transpose(1, 2)}, "k: rows of 8 must be contiguous"),
        ({"lse": torch.zeros(3, 3)}, r"lse is float32 \(3, 3\), expected float32 \(3, 2\)"),
        ({"lse": torch.zeros(3, 2).half()}, "lse is float16"),
        ({"row_offsets": torch.zeros(3, dtype=torch.int64)}, r"row_offsets has shape \(3\), expected \(4,\)"),
        ({"row_offsets": torch.zeros(4, dtype=torch.int32)}, "row_offsets is int32, expected int64"),
        ({"columns": torch.zeros(8, dtype=torch.int32)[::2]}, "columns has shape .* contiguous"),
        ({}, "q is not in a GPU's memory, expected a CUDA device"),
    ],
)
def test_arguments_that_do_not_fit_are_named(changed, message) -> None:
    with pytest.raises(InvalidArgumentError, match=f"graph_forward: {message}"):
        cuda.graph_forward(**forward_arguments(**changed))


def test_tokens_check_their_arguments_too() -> None:
    indptr, found = torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    indices, data, flags = (
        torch.zeros(0, dtype=torch.int32),
        torch.zeros(0),
        torch.zeros(2, dtype=torch.uint8),
    )
    for arguments, message in (
        ((indptr.int(), indices, data, 5, found, flags), "indptr is int32, expected int64"),
        ((indptr[:0], indices, data, 5, found, flags), "indptr is empty, expected num_cells \\+ 1 entries"),
        ((indptr, torch.zeros(1, dtype=torch.int32), data, 5, found, flags), r"indices has shape \(1\)"),
        ((indptr, indices.short(), data, 5, found, flags), "indices is int16, expected int32 or int64"),
        (
            (indptr, indices, data.half(), 5, found, flags),
            "data is float16, expected float32, float64 or an integer",
        ),
        ((indptr, indices, data, 5, found[:3], flags), r"found has shape \(3\), expected \(4,\)"),
        ((indptr, indices, data, 5, found, flags[:1]), r"out_of_order has shape \(1\), expected \(2,\)"),
        ((indptr, indices, data, 5, found, flags), "indptr is not in a GPU's memory"),
    ):
        with pytest.raises(InvalidArgumentError, match=f"check_rows: {message}"):
            cuda.check_rows(*arguments, 0)


def test_a_gene_table_is_checked_as_on_the_cpu() -> None:
    slots = (np.array([0, -1, 1], np.int32), np.array([5, 6], np.int32), np.array([1.0, 2.0]))
    factors, tokens, *_, arithmetic = cuda.gene_table(*slots, 2, "multiply32")
    assert factors.tolist() == [1.0, 0.0, 0.5] and tokens.tolist() == [5, 0, 6] and arithmetic == "multiply32"
    *_, offsets, columns, arithmetic = cuda.gene_table(*slots, 1, "divide32")
    assert offsets.tolist() == [0, 1] and columns.tolist() == [2] and arithmetic == "divide64"
    with pytest.raises(InvalidArgumentError, match="slot_median has 1 entries, expected 2"):
        cuda.gene_table(slots[0], slots[1], slots[2][:1], 2, "multiply64")
    with pytest.raises(InvalidArgumentError, match='arithmetic = "add"'):
        cuda.gene_table(*slots, 2, "add")


# ---- tensors that say they lie on a GPU -----------------------------------------------------------------------------


class _Tensor(ctypes.Structure):
    """DLPack's structure, to be written into."""

    _fields_ = [("data", ctypes.c_void_p), ("device_type", ctypes.c_int32), ("device_id", ctypes.c_int32)]


class OnAnotherDevice:
    """A tensor whose DLPack capsule names another device than the one it lies on."""

    def __init__(self, tensor: torch.Tensor, device_type: int, device_id: int = 0) -> None:
        self.tensor, self.device = tensor, (device_type, device_id)

    def __dlpack__(self, *, stream):
        assert stream == -1
        capsule = self.tensor.__dlpack__(stream=stream)
        pointer = ctypes.pythonapi.PyCapsule_GetPointer
        pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        fields = _Tensor.from_address(pointer(capsule, b"dltensor"))
        fields.device_type, fields.device_id = self.device
        return capsule


def on_gpu(arguments, device_type: int = 2):
    return {
        k: OnAnotherDevice(x, device_type) if isinstance(x, torch.Tensor) else x for k, x in arguments.items()
    }


@without_a_gpu
def test_a_call_without_a_driver_raises_and_does_not_crash() -> None:
    for _ in range(2):
        with pytest.raises(cuda.CudaError, match=r"graph_forward: .*cudaError"):
            cuda.graph_forward(**on_gpu(forward_arguments()))


def test_tensors_of_two_devices_are_refused() -> None:
    arguments = on_gpu(forward_arguments())
    with pytest.raises(InvalidArgumentError, match="k is on cuda:1, expected cuda:0 as q"):
        cuda.graph_forward(**{**arguments, "k": OnAnotherDevice(heads(), 2, 1)})
    with pytest.raises(InvalidArgumentError, match="lse is not in a GPU's memory, expected cuda:0 as q"):
        cuda.graph_forward(**{**arguments, "lse": torch.zeros(3, 2)})
    with pytest.raises(InvalidArgumentError, match="q is not in a GPU's memory"):
        cuda.graph_forward(**on_gpu(forward_arguments(), device_type=10))  # ROCm
