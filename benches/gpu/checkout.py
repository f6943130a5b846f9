"""scfm from this checkout, on a machine where nothing is installed, and what that machine is.

The package is importable as an editable install makes it so: python/scfm, with the root of the checkout on its path
for scfm.kernels. Where nvcc, CMake and pybind11 are at hand the CUDA module is built into build/gpu, else its paths
are left out. Nothing is installed and nothing outside build/gpu is written.
"""

from __future__ import annotations

import datetime
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "gpu"
OLDEST_TORCH = (2, 11)
NO_GPU = 3  # the exit status where there is none


def use_checkout() -> None:
    """Make ``scfm`` and ``scfm.kernels`` importable, whether or not an editable install of this checkout is there."""
    for folder in (ROOT / "benches", ROOT / "python"):  # benches: the shapes
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    import scfm

    found = Path(scfm.__file__).resolve()
    if ROOT not in found.parents:  # an editable install of another checkout comes before any path
        sys.exit(
            f"{sys.executable} has scfm installed from {found.parent}, not from {ROOT}: take another Python"
        )
    if importlib.util.find_spec("scfm.kernels") is None:
        scfm.__path__.append(str(ROOT))


def use_cuda_module(*, build: bool = True) -> str:
    """Make scfm._cuda importable, built first if it is not installed and can be; what came of it, in words."""
    import scfm

    if importlib.util.find_spec("scfm._cuda") is not None:
        return "CUDA kernels: installed"
    reason = _cannot_build() or (_build() if build else None)
    modules = sorted(BUILD.rglob("_cuda*.so"))
    if reason is not None or not modules:
        return f"CUDA kernels: left out, {reason or 'not built'}; Triton's are used alone"
    scfm.__path__.append(str(modules[0].parent))
    return f"CUDA kernels: built in {BUILD.relative_to(ROOT)}"


def _cannot_build() -> str | None:
    if "SCFM_CUDA" not in (ROOT / "CMakeLists.txt").read_text(encoding="utf-8"):
        return "this checkout has none"
    for tool in ("nvcc", "cmake"):
        if shutil.which(tool, path=_search_path()) is None:
            return f"there is no {tool}"
    return "there is no pybind11" if importlib.util.find_spec("pybind11") is None else None


def _search_path() -> str:
    """This Python's own tools first (CMake is often installed beside it), CUDA's usual place last."""
    return os.pathsep.join(
        [str(Path(sys.executable).parent), os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    )


def _build() -> str | None:
    """Configure and build the one target; the end of what was said if that fails."""
    import pybind11

    environment = {**os.environ, "PATH": _search_path()}
    cmake = shutil.which("cmake", path=_search_path())
    assert cmake is not None
    settings = {
        "SCFM_CUDA": "ON",
        "CMAKE_BUILD_TYPE": "Release",
        "SKBUILD_PROJECT_VERSION": "0",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), *(f"-D{k}={v}" for k, v in settings.items())]
    build = [cmake, "--build", str(BUILD), "--target", "_cuda", "--parallel", str(os.cpu_count() or 1)]
    for command in (configure, build):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        if done.returncode:
            # What another CMake or compiler left there spoils the next try.
            shutil.rmtree(BUILD, ignore_errors=True)
            return f"they do not build here ({' '.join((done.stderr or done.stdout).split())[-400:]})"
    return None


def refuse_without_gpu(device: str) -> None:
    """Exit with NO_GPU and a sentence unless the device can be used."""
    import torch

    found = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if found < OLDEST_TORCH:
        sys.exit(_say(f"torch {torch.__version__} is older than {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]}"))
    if device == "cuda" and not torch.cuda.is_available():
        built = "sees no GPU" if torch.version.cuda else "is built without CUDA"
        sys.exit(_say(f"torch {torch.__version__} {built}"))


def _say(reason: str) -> int:
    print(f"Nothing was run: {reason}. `--device cpu` is a dry run on tiny shapes, without any GPU.")
    return NO_GPU


def machine_facts(device: str) -> dict[str, Any]:
    """Hardware, driver, versions and commit, as they are kept beside every figure."""
    import torch
    import triton

    facts: dict[str, Any] = {
        "gpu": None,
        "cpu": _cpu_name(),
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }
    if device == "cuda":
        card = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": card.name,
            "compute_capability": f"{card.major}.{card.minor}",
            "memory_gib": round(card.total_memory / 2**30, 1),
            "multiprocessors": card.multi_processor_count,
            "l2_mib": round(card.L2_cache_size / 2**20, 1),
            "driver": _driver(),
        }
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _driver() -> str:
    """The kernel module's own words; they need no tool to be installed."""
    file = Path("/proc/driver/nvidia/version")
    return file.read_text(encoding="utf-8").splitlines()[0].strip() if file.exists() else "unknown"


def _commit() -> str:
    """The checkout's commit, marked where tracked files differ from it."""

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return "unknown"
    return f"{commit} with changes" if git("status", "--porcelain", "--untracked-files=no") else commit
