"""``make test-gpu``: every operator on every path that this GPU offers, against its formula in float64.

Run with the Python at hand: torch >= 2.11, triton >= 3.6 and numpy, nothing installed. For every path, dtype and
shape: forward and backward into poisoned memory within the bound of rules.py, the same bits twice, a cell alone as in
company (beside cells of NaN too), and a CUDA graph's replay as the plain call. One line each; exit status 0, 1 where
something failed, 3 without a GPU. Operators run in processes of their own, side by side, so that one lost
device takes only its own operator along.

``--device cpu`` is a dry run on tiny shapes, with Triton's interpreter: it shows that this script works, not the GPU.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import checkout

OPERATORS = (
    "varlen_attention",
    "generative_attention",
    "graph_attention",
    "favor_attention",
    "embed_norm",
    "masked_head_loss",
    "rank_value",
)
DTYPES = ("float32", "bfloat16", "float16")
GIB_OF_AN_OPERATOR = 16  # of the float64 formula on 16,907 tokens
_DONE = "every case was run"  # the last words of a process that got to its end


def main() -> int:
    asked = _arguments()
    if asked.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    checkout.use_checkout()
    checkout.refuse_without_gpu(asked.device)
    start = time.perf_counter()
    if asked.is_child:
        checkout.use_cuda_module(build=False)
        status, _ = _count(_own_lines(asked))
        print(_DONE)
        return status
    print(f"{_about(asked.device)}; seed {asked.seed}")
    if asked.device == "cuda":
        print(checkout.use_cuda_module())
    else:
        print("A dry run: tiny shapes, Triton's interpreter.")
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of the NaN that is put there on purpose
    status, counts = _count(_children(asked) if asked.device == "cuda" else _own_lines(asked))
    seconds = time.perf_counter() - start
    print(
        f"{counts['ok']} passed, {counts['FAILED']} failed, {counts['skip']} skipped in {seconds:.0f} s",
        flush=True,
    )
    return status


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--operator", nargs="+", choices=OPERATORS, default=list(OPERATORS))
    parser.add_argument("--path", nargs="+", help="only these paths; default: all of scfm.ops' table")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--seed", type=int, help="of the inputs; fresh by default, 0 in a dry run")
    parser.add_argument("--is-child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.seed is None:
        asked.seed = int(time.time()) if asked.device == "cuda" else 0
    return asked


def _about(device: str) -> str:
    facts = checkout.machine_facts(device)
    where = facts["gpu"] or facts["cpu"]
    return f"{where}, torch {facts['torch']}, triton {facts['triton']}, commit {facts['commit'][:12]}"


def _count(lines: Iterator[str]) -> tuple[int, Counter[str]]:
    """Print every line; the exit status and how many began with each word."""
    counts: Counter[str] = Counter()
    for line in lines:
        print(line, flush=True)
        counts[line.split(maxsplit=1)[0]] += 1
    return int(counts["FAILED"] > 0 or counts["ok"] == 0), counts


def _own_lines(asked: argparse.Namespace) -> Iterator[str]:
    """The lines of this process; torch and scfm are imported no earlier."""
    import rank
    from examine import Asked, lines_of

    settings = Asked(asked.device, asked.seed, tuple(asked.dtype), tuple(asked.path or ()))
    for operator in asked.operator:
        if operator == "rank_value":  # no operator of scfm.ops, and of one path
            yield from rank.lines_of(asked.device, asked.seed)
        else:
            yield from lines_of(operator, settings)


# ---- operators side by side -------------------------------------------------------------------------------------


def _children(asked: argparse.Namespace) -> Iterator[str]:
    """The lines of a process for each operator, as many at once as the GPU's memory and the CPUs allow."""
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    at_once = threading.Semaphore(
        max(1, min(int(gib / GIB_OF_AN_OPERATOR), len(os.sched_getaffinity(0)) // 2))
    )
    found: list[str] = []
    news = threading.Condition()

    def run(operator: str) -> None:
        with at_once:
            for line in _child_lines(asked, operator):
                with news:
                    found.append(line)
                    news.notify()

    threads = [threading.Thread(target=run, args=(operator,)) for operator in asked.operator]
    for thread in threads:
        thread.start()
    shown = 0
    while shown < len(found) or any(thread.is_alive() for thread in threads):
        with news:
            if shown == len(found):
                news.wait(timeout=0.5)
            new = found[shown:]
        shown += len(new)
        yield from new


def _child_lines(asked: argparse.Namespace, operator: str) -> Iterator[str]:
    command = [sys.executable, __file__, "--is-child", "--operator", operator, "--seed", str(asked.seed)]
    command += ["--dtype", *asked.dtype, *(["--path", *asked.path] if asked.path else [])]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert child.stdout is not None
    said = ""
    for line in child.stdout:
        if line.split(maxsplit=1)[:1] in (["ok"], ["FAILED"], ["skip"]):
            yield line.rstrip("\n")
        else:
            said = line.strip() or said
    status = child.wait()
    if said != _DONE:
        yield f"FAILED {operator}: its process ended with {status} before all cases were run: {said}"


if __name__ == "__main__":
    sys.exit(main())
