"""``scfm doctor``: what this machine offers and which path each computation will take."""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from scfm.cli import options
from scfm.cli.console import emit, reporting, say

if TYPE_CHECKING:
    import torch

_PACKAGES = ("torch", "triton", "numpy", "anndata", "h5py", "safetensors", "scanpy", "huggingface-hub")
_HEAD_DIM = 64


def doctor(as_json: options.Json = False) -> None:
    """Print versions, instruction sets, threads and the chosen paths."""
    with reporting(as_json=as_json):
        facts = machine_facts()
        if as_json:
            emit({"ok": True, **facts})
            return
        operators = facts.pop("operators")
        for name, value in facts.items():
            shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
            say(f"{name:>18}: {shown}")
        say(f"\nOperators on {facts['device']}, {facts['dtype auto']}, head_dim {_HEAD_DIM}:")
        for name, verdicts in operators.items():
            for verdict in verdicts:
                shown = name if verdict["chosen"] else ""
                mark = "->" if verdict["chosen"] else "  "
                say(f"{shown:>22} {mark} {verdict['path']}: {verdict['why']} ({verdict['what']})")


def machine_facts() -> dict[str, Any]:
    import torch

    import scfm
    from scfm import _native
    from scfm.data.codec_libraries import codec_in_use
    from scfm.models.nn.precision import resolve_device, resolve_dtype
    from scfm.ops.products import float32_path

    device = resolve_device("auto")
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
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "dtype auto": str(resolve_dtype("auto", device)).removeprefix("torch."),
        "float32 products": float32_path(device),
        "operators": operator_paths(device, resolve_dtype("auto", device)),
    }


def operator_paths(device: torch.device, dtype: torch.dtype) -> dict[str, list[dict[str, Any]]]:
    """For every operator its paths, the chosen one first: what it is, whether it is taken, and why."""
    import torch

    from scfm.ops import paths

    tensor = torch.empty(1, 1, _HEAD_DIM, device=device, dtype=dtype)
    found = {}
    for name in paths.operators():
        verdicts = sorted(paths.explain(name, tensor), key=lambda verdict: not verdict.chosen)
        found[name] = [asdict(verdict) for verdict in verdicts]
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
