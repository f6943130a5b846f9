"""A checkpoint of Geneformer-V1-10M and its AdamW: how long training stands still, and how long until it is safe.

    pytest benches/bench_checkpoint.py --benchmark-json=benches/results/checkpoint.json -s

Weights, moments and step numbers of 10 M parameters, about 124 MB, to the folder that pytest's --basetemp names, one
thread. Stall: until training may go on. Safe: until the checkpoint is whole and its bytes are synced; ours includes
manifest, checksums and the rename. Peers: torch.save with an fsync, which is both, and torch.distributed.checkpoint's
async_save with its safetensors writer, sharded.
"""

from __future__ import annotations

import os
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scfm.models.geneformer.config import GeneformerConfig
from scfm.models.geneformer.model import Geneformer
from scfm.tokenize.dictionaries import GeneformerDictionaries
from scfm.train.checkpoint import CheckpointStore, TrainState
from scfm.train.checkpoint.named_tensors import model_tensors, optimizer_tensors

ROUNDS = 7
NUM_GENES = 25_424
_RATES: dict[str, float] = {}
Save = Callable[[int], tuple[float, float]]


@pytest.fixture(scope="module")
def trained() -> tuple[Geneformer, torch.optim.AdamW]:
    torch.set_num_threads(1)
    genes = [f"ENSG{i:011d}" for i in range(NUM_GENES)]
    vocab = GeneformerDictionaries.from_vocabulary(genes, dict.fromkeys(genes, 1.0), version="V1")
    config = GeneformerConfig.preset("V1-10M", vocab_size=max(vocab.token.values()) + 1)
    model = Geneformer.from_config(config, vocab, seed=0)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return model, optimizer


def measured(benchmark: Any, name: str, num_bytes: int, save: Save) -> None:
    """``save`` tells its stall and its whole time in seconds; the first one, which makes buffers, stands apart."""
    first = save(0)
    times: list[tuple[float, float]] = []
    benchmark.pedantic(lambda: times.append(save(len(times) + 1)), rounds=ROUNDS, iterations=1)
    stall, safe = (statistics.median(column) for column in zip(*times, strict=True))
    facts = {
        "stall_ms": stall * 1e3,
        "first_stall_ms": first[0] * 1e3,
        "until_safe_ms": safe * 1e3,
        "safe_megabytes_per_second": num_bytes / safe / 1e6,
    }
    _RATES[name] = stall
    benchmark.extra_info |= {key: round(value, 2) for key, value in facts.items()}
    print(f"\n{name}, {num_bytes / 1e6:.0f} MB: " + ", ".join(f"{k} {v:.1f}" for k, v in facts.items()))


def all_tensors(trained: tuple[Geneformer, torch.optim.AdamW]) -> dict[str, Tensor]:
    return {**model_tensors(trained[0]), **optimizer_tensors(*trained)}


def bench_scfm(benchmark: Any, trained: Any, tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "checkpoints")

    def save(number: int) -> tuple[float, float]:
        begun = time.perf_counter()
        store.save(TrainState(number + 1, 0, 0, 0), *trained)
        stall = time.perf_counter() - begun
        while store.poll() is None:  # as a loop asks at every step
            time.sleep(0.002)
        safe = time.perf_counter() - begun
        store.finish()  # deleting older ones is not a part of it
        return stall, safe

    measured(benchmark, "scfm", sum(t.nbytes for t in all_tensors(trained).values()), save)


def bench_torch_save(benchmark: Any, trained: Any, tmp_path: Path) -> None:
    tensors = all_tensors(trained)

    def save(number: int) -> tuple[float, float]:
        begun = time.perf_counter()
        with (tmp_path / f"{number}.pt").open("wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())
        took = time.perf_counter() - begun
        (tmp_path / f"{number}.pt").unlink()
        return took, took

    measured(benchmark, "torch.save", sum(t.nbytes for t in tensors.values()), save)


def bench_torch_distributed_checkpoint(benchmark: Any, trained: Any, tmp_path: Path) -> None:
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    tensors = all_tensors(trained)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)

    def save(number: int) -> tuple[float, float]:
        writer = HuggingFaceStorageWriter(str(tmp_path / str(number)), save_distributed=True)
        begun = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            future: Any = async_save(tensors, storage_writer=writer)
        stall = time.perf_counter() - begun
        future.result()
        return stall, time.perf_counter() - begun

    try:
        measured(benchmark, "torch async_save", sum(t.nbytes for t in tensors.values()), save)
    finally:
        dist.destroy_process_group()
    if "scfm" in _RATES:
        ratio = _RATES["torch async_save"] / _RATES["scfm"]
        benchmark.extra_info["stall_over_scfm"] = round(ratio, 2)
        print(f"its stall over scfm's: {ratio:.2f}")
