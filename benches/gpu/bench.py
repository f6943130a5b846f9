"""``make bench-gpu``: every operator at the shapes of the released models, beside torch's and flash-attn's.

Run with the Python at hand: torch >= 2.11, triton >= 3.6 and numpy, nothing installed. Prints milliseconds, the rate,
its share of the peak measured in the same run, how many times as long a peer takes as we do, and the goal; writes
benches/results/<gpu>.json with hardware, driver, versions and commit. Peers are called the way that is fastest for
them (contenders.py); one that is not here, or cannot run a shape, is listed with the reason. Without a GPU the exit
status is 3.

``--device cpu --tiny`` is a dry run of every branch that a CPU can take; it writes nothing unless --out is given.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import checkout

SECTIONS = (
    "varlen",
    "generative",
    "graph",
    "favor",
    "embed_norm",
    "masked_head_loss",
    "end_to_end",
    "small_calls",
)


def main() -> int:
    asked = _arguments()
    if asked.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    checkout.use_checkout()
    checkout.refuse_without_gpu(asked.device)
    facts = checkout.machine_facts(asked.device)
    print(
        f"{facts['gpu'] or facts['cpu']}, torch {facts['torch']}, triton {facts['triton']}, {facts['commit'][:12]}"
    )
    if asked.device == "cuda":
        print(checkout.use_cuda_module())
    else:
        warnings.simplefilter("ignore")  # of an interpreter and of compilers that are not asked to compile
    path = _output(asked, facts["gpu"])
    for section, found in _sections(asked):
        if path is not None:  # at once: a run that is cut off keeps what it has measured
            _keep(path, facts, section, found)
    if path is not None:
        print(f"\n{path}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="toy shapes: to see that the script works")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--out", type=Path, help="where the figures go; default: benches/results/<gpu>.json")
    asked = parser.parse_args()
    if asked.device == "cpu" and not asked.tiny:
        parser.error("on a CPU only --tiny can be run; `make bench` measures the CPU")
    return asked


def _sections(asked: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Peaks first, then every section; torch and scfm are imported no earlier."""
    import attention
    import end_to_end
    import timing
    import tokens
    import torch

    functions = {
        "varlen": attention.varlen,
        "generative": attention.generative,
        "graph": attention.graph,
        "favor": attention.favor,
        "embed_norm": tokens.embed_norm,
        "masked_head_loss": tokens.masked_head_loss,
        "end_to_end": end_to_end.cells_per_second,
        "small_calls": tokens.small_calls,
    }
    clock = timing.Clock(asked.device)
    peaks = timing.measure_peaks(clock)
    print(
        f"Measured peaks: {peaks.tflop_per_s:,.1f} TFLOP/s of bfloat16 products, {peaks.gb_per_s:,.0f} GB/s copied"
    )
    run = attention.Run(clock, peaks, asked.tiny)
    for section in asked.sections:
        start = time.perf_counter()
        rows = [row.as_dict() for row in functions[section](run)]
        yield (
            section,
            {
                "peak_tflop_per_s_bfloat16": round(peaks.tflop_per_s, 1),
                "peak_gb_per_s": round(peaks.gb_per_s, 1),
                "seconds": round(time.perf_counter() - start, 1),
                "rows": rows,
            },
        )
        if asked.device == "cuda":
            torch.cuda.empty_cache()


def _output(asked: argparse.Namespace, gpu: str | None) -> Path | None:
    if asked.out is not None or gpu is None or asked.tiny:
        return asked.out
    return checkout.ROOT / "benches" / "results" / ("-".join(gpu.lower().split()) + ".json")


def _keep(path: Path, facts: dict[str, Any], section: str, found: dict[str, Any]) -> None:
    """Replace one section of the file, with the versions it was measured with; the file whole or not at all."""
    before = json.loads(path.read_text(encoding="utf-8"))["sections"] if path.exists() else {}
    sections = {**before, section: {**facts, **found}}
    result = {
        "gpu": facts["gpu"],
        "sections": {name: sections[name] for name in SECTIONS if name in sections},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    part.replace(path)


if __name__ == "__main__":
    sys.exit(main())
