"""``scfm doctor``: what this machine offers and which path each computation will take, and why.

Paths are asked for every device that is here and every dtype that models compute in; where one is not taken, the
reason is its own words. With --json the same under "paths", and under "operators" those of the default device and
dtype.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from scfm.cli import options
from scfm.cli.console import emit, reporting, say

if TYPE_CHECKING:
    import torch

_PACKAGES = (
    "torch", "triton", "flash-attn", "numpy", "anndata", "h5py", "safetensors", "scanpy", "huggingface-hub"
)  # fmt: skip
_HEAD_DIM = 64
_DTYPES = ("float32", "bfloat16", "float16")
Verdicts = list[dict[str, Any]]


def doctor(as_json: options.Json = False) -> None:
    """Print versions, instruction sets, threads and the chosen paths."""
    with reporting(as_json=as_json):
        facts = machine_facts()
        if as_json:
            emit({"ok": True, **facts})
            return
        del facts["operators"]
        found = facts.pop("paths")
        for name, value in facts.items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            say(f"{name:>18}: {shown}")
        for device, of_device in found.items():
            _say_paths(device, of_device)


def _say_paths(device: str, of_device: dict[str, Any]) -> None:
    """A line an operator with what computes each dtype, then a line a path with why."""
    say(
        f"\nOperators on {device}, head_dim {_HEAD_DIM}. The first path without an objection is taken, from the top."
    )
    say(f"Their order: {of_device['order']}.")
    for name, by_dtype in of_device["operators"].items():
        chosen = {
            dtype: next(v["path"] for v in verdicts if v["chosen"]) for dtype, verdicts in by_dtype.items()
        }
        say(f"\n{name:>22} -> {_joined(chosen)}")
        for row, first in enumerate(by_dtype[_DTYPES[0]]):
            reasons = {dtype: verdicts[row]["why"] for dtype, verdicts in by_dtype.items()}
            mark = "->" if first["path"] in chosen.values() else "  "
            say(f"{'':>22} {mark} {first['path']}, {first['what']}: {_joined(reasons)}")


def _joined(by_dtype: dict[str, str]) -> str:
    """{"float32": "a", "bfloat16": "b", "float16": "b"} as "a (float32); b (bfloat16, float16)"."""
    dtypes: dict[str, list[str]] = {}
    for dtype, text in by_dtype.items():
        dtypes.setdefault(text, []).append(dtype)
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return "; ".join(f"{text} ({', '.join(names)})" for text, names in dtypes.items())


def machine_facts() -> dict[str, Any]:
    import torch

    import scfm
    from scfm import _native
    from scfm.data.codec_libraries import codec_in_use
    from scfm.models.nn.precision import resolve_device, resolve_dtype
    from scfm.ops.products import float32_path

    device = resolve_device("auto")
    dtype = str(resolve_dtype("auto", device)).removeprefix("torch.")
    paths = {str(place): paths_on(place) for place in dict.fromkeys([device, torch.device("cpu")])}
    return {
        "scfm": scfm.__version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "instruction sets": ", ".join(_native.available_isas()),
        "native path": _native.active_isa(),
        "native threads": _native.get_num_threads(),
        "inflating counts": {
            shown: codec_in_use(name) or "not found: h5py or zarr instead"
            for shown, name in (("gzip", "zlib"), ("zstd", "zstd"), ("blosc", "blosc"), ("lz4", "lz4"))
        },
        "torch threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": _gpu(),
        "CUDA kernels": _cuda_module(),
        "dtype auto": dtype,
        "float32 products": float32_path(device),
        "operators": {
            name: sorted(of[dtype], key=lambda verdict: not verdict["chosen"])
            for name, of in paths[str(device)]["operators"].items()
        },
        "paths": paths,
    }


def paths_on(device: torch.device) -> dict[str, Any]:
    """{"order": where the order comes from, "operators": {operator: {dtype: verdicts in that order}}}."""
    import torch

    from scfm.ops import paths

    found: dict[str, dict[str, Verdicts]] = {}
    for name in paths.operators():
        tensors = {
            dtype: torch.empty(1, 1, _HEAD_DIM, device=device, dtype=getattr(torch, dtype))
            for dtype in _DTYPES
        }
        found[name] = {
            dtype: [asdict(v) for v in paths.explain(name, tensor)] for dtype, tensor in tensors.items()
        }
    return {"order": paths.ORDER.get(device.type, "not measured on this device"), "operators": found}


def _gpu() -> str:
    """Name, compute capability and memory; or why there is none."""
    import torch

    if not torch.cuda.is_available():
        built = "torch sees no GPU" if torch.version.cuda else "this torch is built for the CPU"
        return f"none: {built}"
    facts = torch.cuda.get_device_properties(0)
    more = f", {torch.cuda.device_count()} of them" if torch.cuda.device_count() > 1 else ""
    return f"{facts.name}, compute capability {facts.major}.{facts.minor}, {facts.total_memory / 2**30:.0f} GiB{more}"


def _cuda_module() -> str:
    try:
        import scfm._cuda  # noqa: F401
    except ImportError as error:
        return f"not built ({error})"
    return "built"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
