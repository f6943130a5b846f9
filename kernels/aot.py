"""Compile the kernels ahead of time, without a GPU, and read what became of them.

``python -m scfm.kernels.aot`` prints, for every kernel and architecture, its registers, shared memory, spills and
matrix instructions (kept in benches/results/triton-aot.txt). A kernel that spills, or whose products missed the tensor
cores, is slow without being wrong: no test on values finds it, this table does. Every kernel module lists what to
compile in ``aot_targets()``, with the types and alignments that its launches have.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from .launch import INTERPRETED, Options

MODULES = (
    "tiles",
    "varlen_attention",
    "generative_attention",
    "favor_attention",
    "graph_attention",
    "embed_norm",
    "masked_head",
)
ARCHITECTURES = (80, 86, 90, 100)
# By machine instruction: what products become on sm_80, sm_90 and sm_100, and 16-byte copies into shared memory.
_MATRIX = {
    "HMMA": "mma.sync",
    "HGMMA": "wgmma",
    "UTCHMMA": "tcgen05",
    "UTCQMMA": "tcgen05",
    "DMMA": "mma.sync f64",
}
_SPILLS = ("LDL", "STL")
_WATCHED = (*_MATRIX, *_SPILLS, "LDGSTS", "UTMALDG")


@dataclass(frozen=True)
class Target:
    """One kernel with the types it is compiled for.

    signature: Triton's type of every run-time parameter ("*bf16", "i32", "fp32"), with ":16" behind it where launches
    pass pointers or numbers divisible by 16. constants: the constexpr parameters by name. multiplies: tl.dot is to
    run on tensor cores. rare: compiled only when asked for (``--all``). may_spill: known not to fit the registers of
    every GPU, thus slow there; for widths that no released model has.
    """

    name: str
    kernel: Callable[..., Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    options: Options = field(default_factory=Options)
    multiplies: bool = True
    architectures: tuple[int, ...] = (80, 90, 100)
    rare: bool = False
    may_spill: bool = False


@dataclass(frozen=True)
class Report:
    """What the compiler made of a target: registers a thread, bytes of shared memory, instructions by name."""

    name: str
    architecture: int
    registers: int
    shared: int
    spills: int
    matrix: str
    matrix_instructions: int
    async_copies: int
    seconds: float
    multiplies: bool
    may_spill: bool

    @property
    def complaint(self) -> str:
        if self.spills and not self.may_spill:
            return f"{self.spills} spilling instructions"
        if self.multiplies and not self.matrix_instructions:
            return "no matrix instructions"
        return ""


def compile_for(target: Target, architecture: int) -> Report:
    """Compile with Triton's own compiler and take the machine code apart."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process, not compiled")
    names = [parameter.name for parameter in target.kernel.params]  # type: ignore[attr-defined]
    missing = set(names) ^ (set(target.signature) | set(target.constants))
    if missing:
        raise ValueError(f"{target.name}: the target and its kernel differ in {sorted(missing)}")
    types = {name: target.signature.get(name, "constexpr") for name in names}
    source = ASTSource(
        fn=target.kernel,
        signature={name: kind.removesuffix(":16") for name, kind in types.items()},
        constexprs={(names.index(name),): value for name, value in target.constants.items()},
        attrs={
            (names.index(n),): [["tt.divisibility", 16]] for n, kind in types.items() if kind.endswith(":16")
        },
    )
    start = time.perf_counter()
    compiled = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options=target.options.keywords
    )
    seconds = time.perf_counter() - start
    registers, instructions = _take_apart(compiled.asm["cubin"])
    matrix = {name: count for name, count in instructions.items() if name in _MATRIX}
    return Report(
        name=target.name,
        architecture=architecture,
        registers=registers,
        shared=compiled.metadata.shared,
        spills=sum(instructions[name] for name in _SPILLS),
        matrix=" ".join(sorted({_MATRIX[name] for name in matrix})),
        matrix_instructions=sum(matrix.values()),
        async_copies=instructions["LDGSTS"] + instructions["UTMALDG"],
        seconds=round(seconds, 2),
        multiplies=target.multiplies,
        may_spill=target.may_spill,
    )


def _take_apart(cubin: bytes) -> tuple[int, Counter[str]]:
    """Registers a thread, and how often each watched instruction stands in the code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _output(tools / "cuobjdump", "--dump-resource-usage", file)
        code = _output(tools / "nvdisasm", "-c", file)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump tells no registers: {usage[:200]}")
    return int(registers[1]), Counter(re.findall(rf"\b({'|'.join(_WATCHED)})\b", code))


def _output(tool: Path, *arguments: object) -> str:
    return subprocess.run([tool, *map(str, arguments)], check=True, capture_output=True, text=True).stdout


def targets_of(module: str) -> list[Target]:
    """The targets of scfm.kernels.<module>."""
    found: list[Target] = import_module(f"{__package__}.{module}").aot_targets()
    return found


def _compile_named(job: tuple[str, str, int]) -> Report:
    """A target by its names: kernels do not travel between processes."""
    module, name, architecture = job
    named = (t for t in targets_of(module) if t.name == name and architecture in t.architectures)
    return compile_for(next(named), architecture)


def compile_all(
    modules: Sequence[str] = MODULES,
    architectures: Sequence[int] = ARCHITECTURES,
    *,
    rare: bool = False,
    processes: int = 1,
) -> list[Report]:
    """Every target of the modules for every architecture, in the modules' order."""
    jobs = [
        (module, target.name, architecture)
        for module in modules
        for target in targets_of(module)
        if rare or not target.rare
        for architecture in target.architectures
        if architecture in architectures
    ]
    if processes == 1:
        return [_compile_named(job) for job in jobs]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(pool.map(_compile_named, jobs))


def table(reports: Sequence[Report]) -> str:
    """One line a report, under what compiled them; the same kernels and compiler give the same text."""
    lines = [
        f"Triton {triton.__version__}, ptxas as it ships it: compiled, not run. Registers a thread, shared memory in "
        "bytes a program, spilling instructions, matrix instructions, asynchronous 16-byte copies.",
        f"{'kernel':<44} {'arch':<6} {'regs':>4} {'shared':>7} {'spills':>6} {'matrix':>13} {'copies':>6}",
    ]
    for r in reports:
        matrix = f"{r.matrix} {r.matrix_instructions}" if r.matrix else "-"
        lines.append(
            f"{r.name:<44} sm_{r.architecture:<3} {r.registers:>4} {r.shared:>7} {r.spills:>6} {matrix:>13} "
            f"{r.async_copies:>6}  {r.complaint}".rstrip()
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scfm.kernels.aot", description=__doc__)
    parser.add_argument("modules", nargs="*", help="kernel modules; default: all there are")
    parser.add_argument("--arch", type=int, nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--processes", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--all", action="store_true", help="also rare targets: wide heads, smaller GPUs")
    parser.add_argument("--json", action="store_true", help="reports as JSON instead of a table")
    return parser.parse_args()


def main() -> int:
    """Print the table; the exit status is 1 if a kernel spills or misses the tensor cores."""
    arguments = _arguments()
    modules = arguments.modules or [m for m in MODULES if find_spec(f"{__package__}.{m}")]
    with tempfile.TemporaryDirectory() as cache:  # so that everything is compiled, and nothing is left behind
        os.environ["TRITON_CACHE_DIR"] = cache
        reports = compile_all(modules, arguments.arch, rare=arguments.all, processes=arguments.processes)
    text = (
        json.dumps([asdict(r) | {"complaint": r.complaint} for r in reports])
        if arguments.json
        else table(reports)
    )
    sys.stdout.write(text + "\n")
    return int(any(r.complaint for r in reports))


if __name__ == "__main__":
    # As a script this file is another module than the one that kernel modules import their Target from.
    sys.exit(import_module(f"{__package__}.aot").main())
