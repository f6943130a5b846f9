"""What the compiler made of the CUDA kernels, read from the built module: registers, shared memory, no spills.

A kernel that spills is slow without being wrong: no test on values finds it. The limits keep the occupancy that the
kernels' headers count on: a multiprocessor has 65,536 registers and, on every architecture built for, room for 2,048
threads.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

cuda = pytest.importorskip("scfm._cuda", reason="the CUDA module is not built", exc_type=ImportError)

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
# kernel: threads of a block, blocks that a multiprocessor must hold, instances
KERNELS = {
    "graph_forward_kernel": (256, 3, 12),
    "graph_row_gradients_kernel": (256, 2, 12),
    "graph_column_gradients_kernel": (256, 2, 12),
    "check_rows_kernel": (256, 8, 1),
    "row_sums_kernel": (256, 8, 1),
    "row_facts_kernel": (256, 4, 1),
    "offsets_kernel": (1024, 1, 1),
    "order_rows_kernel": (512, 2, 1),
    "rank_rows_kernel": (512, 2, 1),
}
REGISTERS, SHARED = 65_536, 100 * 1024  # shared: what the smallest (8.6, which runs sm_80's code) offers


def tool(name: str) -> str:
    """From triton's wheel, which the tests have anyway; else from a CUDA toolkit."""
    found = find_spec("triton")
    path = (
        Path(found.origin).parent / "backends" / "nvidia" / "bin" / name if found and found.origin else Path()
    )
    if path.is_file():
        return str(path)
    in_toolkit = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if in_toolkit is None:
        pytest.skip(f"{name} is in neither triton's wheel nor a CUDA toolkit")
    return in_toolkit


@cache
def usage() -> dict[tuple[str, str], dict[str, int]]:
    """(architecture, mangled kernel) -> REG, STACK, SHARED, LOCAL."""
    text = subprocess.run(
        [tool("cuobjdump"), "--dump-resource-usage", cuda.__file__],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found, architecture = {}, ""
    for line in text.splitlines():
        if match := re.match(r"arch = (\w+)", line.strip()):
            architecture = match[1]
        elif match := re.search(r"Function (\w+)", line):
            function = match[1]
        elif "REG:" in line:
            found[architecture, function] = {k: int(v) for k, v in re.findall(r"(\w+):(\d+)", line)}
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_there(architecture: str) -> None:
    counts = Counter(
        name for of, function in usage() if of == architecture for name in KERNELS if name in function
    )
    assert dict(counts) == {name: instances for name, (_, _, instances) in KERNELS.items()}


@pytest.mark.parametrize("kernel", KERNELS)
def test_registers_and_shared_memory(kernel: str) -> None:
    threads, blocks, _ = KERNELS[kernel]
    for (architecture, function), used in usage().items():
        if kernel not in function:
            continue
        assert used["STACK"] == used["LOCAL"] == 0, (architecture, function, used)
        in_eights = (used["REG"] + 7) // 8 * 8
        assert in_eights * threads * blocks <= REGISTERS, (architecture, function, used)
        assert used["SHARED"] <= 48 * 1024 and used["SHARED"] * blocks <= SHARED, (
            architecture,
            function,
            used,
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code_has_no_spills_and_reads_whole_vectors(architecture: str, tmp_path: Path) -> None:
    subprocess.run([tool("cuobjdump"), "--extract-elf", "all", cuda.__file__], check=True, cwd=tmp_path,
                   capture_output=True)  # fmt: skip
    cubins = sorted(tmp_path.glob(f"*{architecture}.cubin"))
    assert cubins
    code = "".join(
        subprocess.run([tool("nvdisasm"), "-c", cubin], check=True, capture_output=True, text=True).stdout
        for cubin in cubins
    )
    parts = re.split(r"\n\s*\.section\s+\.text\.", code)[1:]
    seen = Counter()
    for part in parts:
        name = part.split(",", 1)[0]
        instructions = Counter(re.findall(r"\b(LDL|STL|LDG\.E\.128|ATOM|RED)\b", part))
        assert not instructions["LDL"] and not instructions["STL"], (name, instructions)
        if "graph_" in name:
            seen["graph"] += 1
            assert instructions["LDG.E.128"] or "LDG.E.128" in part, name
            assert not instructions["ATOM"] and not instructions["RED"], name
    assert seen["graph"] == 36


def test_later_architectures_have_something_to_compile() -> None:
    text = subprocess.run(
        [tool("cuobjdump"), "--list-ptx", cuda.__file__], check=True, capture_output=True, text=True
    ).stdout
    assert "sm_100.ptx" in text


def test_nothing_of_cuda_is_linked_dynamically() -> None:
    text = subprocess.run(["ldd", cuda.__file__], check=True, capture_output=True, text=True).stdout
    assert "cuda" not in text.lower().replace(Path(cuda.__file__).name, "")
