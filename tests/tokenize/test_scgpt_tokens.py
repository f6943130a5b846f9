"""Bins, tokens and masks against the outputs of the authors' code: exactly, and random rules by their exact law."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from scipy.stats import chisquare

from scfm import _native
from scfm.data.packed import PackedCells
from scfm.tokenize.scgpt import bin_quantiles
from scfm.tokenize.scgpt_binning import bin_matrix, bin_packed
from scfm.tokenize.scgpt_generative import split_as_upstream
from scfm.tokenize.scgpt_masking import hide_each_as_upstream, hide_share_as_upstream
from scfm.tokenize.scgpt_upstream import cut_as_upstream

Golden = Mapping[str, np.ndarray]
PAD, CLS = 297, 298


@pytest.fixture
def golden(goldens: Callable[[str], Path]) -> Callable[[str], Golden]:
    def load(name: str) -> Golden:
        with np.load(goldens("scgpt") / f"{name}.npz", allow_pickle=False) as file:
            return {key: file[key] for key in file.files}

    return load


def seed_all(seed: int) -> None:
    # The original's generator, so the legacy one.
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)


def examples(golden: Golden) -> PackedCells:
    """The examples given to the collator: genes and raw values, <cls> first."""
    genes = [golden[f"ex{i}.genes"].tolist() for i in range(5)]
    return PackedCells.from_lists(genes, [golden[f"ex{i}.expr"] for i in range(5)])


def padded(packed: PackedCells, values: torch.Tensor | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Genes and values as the original pads them."""
    longest = int(packed.lengths.max())
    real = (torch.arange(longest) < packed.lengths.unsqueeze(1)).numpy()
    genes = np.full(real.shape, PAD)
    genes[real] = packed.token_ids.numpy()
    out = np.full(real.shape, -2.0, np.float32)
    out[real] = (packed.values if values is None else values).numpy()
    return genes, out


CASES = [
    "cont_f32",
    "cont_f64",
    "few_7",
    "few_2",
    "n51",
    "n50",
    "n99_tiesfree",
    "withzeros_f32",
    "withzeros_f64",
]


@pytest.mark.parametrize("num_bins", [51, 11])
@pytest.mark.parametrize("case", [*CASES, "allzero", "few_1"])
def test_binning_of_one_row(golden: Callable[[str], Golden], case: str, num_bins: int) -> None:
    found = golden("binning_deterministic")
    x, tag = found[f"{case}.in"], f"{case}.bins{num_bins}"
    binned = bin_matrix(x[None], num_bins=num_bins)
    if case == "few_1":  # random by design
        assert 1 <= binned.bins.toarray()[0, 0] < num_bins
    else:
        assert found[f"{tag}.deterministic"]
        np.testing.assert_array_equal(binned.bins.toarray()[0], found[f"{tag}.torch"])
    if case == "allzero":
        assert not binned.edges.any()
        return
    np.testing.assert_array_equal(binned.edges[0, 1:], np.quantile(x[x != 0], bin_quantiles(num_bins)))
    if f"{tag}.edges" in found:
        np.testing.assert_array_equal(binned.edges[0, 1:], found[f"{tag}.edges"])
    _, left, right = _native.value_edges(x, np.array([0, x.size]), bin_quantiles(num_bins))
    np.testing.assert_array_equal(left[x != 0], found[f"{tag}.left"])
    np.testing.assert_array_equal(right[x != 0], found[f"{tag}.right"])
    highest = bin_matrix(x[None], num_bins=num_bins, binning="pretrain").bins.toarray()[0]
    np.testing.assert_array_equal(highest[x != 0], found[f"{tag}.side_one"])


@pytest.mark.parametrize("case", ["counts_2000", "counts_400"])
def test_binning_with_ties(golden: Callable[[str], Golden], case: str) -> None:
    found = {key.removeprefix(f"{case}."): value for key, value in golden("binning_random").items()}
    x = found["in"]
    seed_all(int(found["np_seed"]))
    drawn = bin_matrix(x[None], binning="upstream")
    np.testing.assert_array_equal(drawn.edges[0, 1:], found["edges"])
    np.testing.assert_array_equal(drawn.bins.toarray()[0], found["seeded"])
    # The seeded rule: for each distinct value uniform over the bins that the original ever gave it.
    histogram = np.zeros_like(found["hist_by_value"])
    value_of = np.searchsorted(found["uniq"], x)
    num_trials = 300
    for seed in range(num_trials):
        np.add.at(histogram, (value_of, bin_matrix(x[None], seed=seed).bins.toarray()[0]), 1)
    for ours, value in zip(histogram, found["uniq"], strict=True):
        low, high = found["right"][x == value][0] + 1, max(found["left"][x == value][0], 1)
        low = min(low, high)
        assert ours[low : high + 1].sum() == (x == value).sum() * num_trials
        assert low == high or chisquare(ours[low : high + 1]).pvalue > 1e-5
    for theirs, value in zip(found["hist_by_value"], found["uniq"], strict=True):
        assert set(np.flatnonzero(theirs)) <= set(
            range(found["right"][x == value][0], found["left"][x == value][0] + 1)
        )


@pytest.mark.parametrize(
    ("tag", "max_tokens", "binned", "cut", "probability"),
    [
        ("pad", 1200, True, None, None),
        ("trunc50", 50, True, "head", None),
        ("sample50", 50, True, "sample", None),
        ("nobin", 1200, False, None, None),
        ("mlm", 1200, True, None, 0.4),
    ],
)
def test_collator(
    golden: Callable[[str], Golden],
    tag: str,
    max_tokens: int,
    binned: bool,
    cut: str | None,
    probability: float | None,
) -> None:
    found = golden("collator")
    seed_all(int(found["seed"]))
    packed = examples(found)
    if binned:
        packed = bin_packed(packed, binning="upstream")
    if cut == "sample":
        packed = cut_as_upstream(packed, max_tokens, num_first=1)
    elif cut == "head":
        ends = np.minimum(packed.lengths.numpy(), max_tokens)
        lists = [genes[:end] for genes, end in zip(packed.to_lists(), ends, strict=True)]
        values = np.split(packed.values.numpy(), packed.cu_seqlens.numpy()[1:-1])
        packed = PackedCells.from_lists(lists, [v[:end] for v, end in zip(values, ends, strict=True)])
    genes, values = padded(packed)
    np.testing.assert_array_equal(genes, found[f"{tag}.gene"])
    np.testing.assert_array_equal(values, found[f"{tag}.expr"])
    if probability is not None:
        hidden = hide_each_as_upstream(packed, probability).packed
        np.testing.assert_array_equal(padded(hidden)[1], found[f"{tag}.masked_expr"])


def test_collator_that_keeps_no_first_token(golden: Callable[[str], Golden]) -> None:
    """The original then bins the -2 of <cls> among the values; its genes are what is compared."""
    found = golden("collator")
    seed_all(int(found["seed"]))
    cut = cut_as_upstream(examples(found), 50, num_first=0)
    np.testing.assert_array_equal(padded(cut)[0], found["sample50_keep0.gene"])


@pytest.mark.parametrize(
    ("tag", "max_tokens", "ratio"),
    [("both_1200", 1200, 0.25), ("both_50", 50, 0.5), ("both_list", 60, [0.25, 0.5, 0.75])],
)
def test_generative_collator(
    golden: Callable[[str], Golden], tag: str, max_tokens: int, ratio: float | list[float]
) -> None:
    found = golden("M_collator_dev")
    seed_all(int(found["seed"]))
    cells = split_as_upstream(bin_packed(examples(found), binning="pretrain"), ratio, max_tokens=max_tokens)
    for cell in range(5):
        tokens = cells.packed.select([cell])
        known = int(cells.num_known[cell])
        for side, mine in (("pcpt", slice(0, known)), ("gen", slice(known, None))):
            genes = found[f"{tag}.{side}_gene"][cell]
            values = found[f"{tag}.{'pcpt_expr' if side == 'pcpt' else 'gen_expr_target'}"][cell]
            real = genes != PAD
            np.testing.assert_array_equal(tokens.token_ids[mine], genes[real])
            np.testing.assert_array_equal(tokens.values[mine], values[real])


def test_generative_collator_of_one_side(golden: Callable[[str], Golden]) -> None:
    found = golden("M_collator_dev")
    seed_all(int(found["seed"]))
    cut = cut_as_upstream(bin_packed(examples(found), binning="pretrain"), 50, num_first=1)
    genes, values = padded(cut)
    np.testing.assert_array_equal(genes, found["gen_50.pcpt_gene"])
    np.testing.assert_array_equal(values, found["gen_50.pcpt_expr"])
    seed_all(int(found["seed"]))
    cut = cut_as_upstream(bin_packed(examples(found), binning="pretrain"), 60, num_first=1)
    genes, values = padded(cut)
    np.testing.assert_array_equal(genes, found["pcpt_mask.gene"])
    np.testing.assert_array_equal(values, found["pcpt_mask.expr"])
    hidden = hide_each_as_upstream(cut, 0.4, pretraining=True).packed
    np.testing.assert_array_equal(padded(hidden)[1], found["pcpt_mask.masked_expr"])


def counts_as_block(counts: np.ndarray) -> dict[str, Any]:
    csr = sp.csr_matrix(counts.astype(np.float32))
    return {
        "indptr": csr.indptr.astype(np.int64),
        "indices": csr.indices,
        "data": csr.data,
        "column_slot": np.arange(counts.shape[1], dtype=np.int32),
    }


@pytest.mark.parametrize(
    ("tag", "zeros"), [("nz_pad", False), ("nz_sample", False), ("zeros", True), ("zeros_sample", True)]
)
def test_fine_tuning_tokenizer(golden: Callable[[str], Golden], tag: str, zeros: bool) -> None:
    found = golden("tokenize")
    max_tokens = int(found[f"{tag}.max_len"])
    result = _native.value_bins(
        **counts_as_block(found["X"]),
        slot_token=found["gene_ids"].astype(np.int32),
        quantiles=np.empty(0),
        rule="left",
        draws=None,
        draw_offsets=None,
        kept="any",
        max_tokens=-1,
        prefix_token=CLS,
        prefix_value=0.0,
        with_zeros=zeros,
        seed=0,
        epoch=0,
    )
    packed = PackedCells(
        torch.from_numpy(result.token_ids),
        torch.from_numpy(result.values),
        torch.from_numpy(result.cu_seqlens.astype(np.int32)),
        torch.arange(len(found["X"])),
    )
    seed_all(int(found["seed"]))
    packed = cut_as_upstream(packed, max_tokens, num_first=1, drawn_by="numpy")
    genes, values = padded(packed)
    np.testing.assert_array_equal(genes, found[f"{tag}.genes"])
    np.testing.assert_array_equal(values, found[f"{tag}.values"])
    seed_all(int(found["seed"]) + 1)
    hidden = hide_share_as_upstream(packed, 0.4).packed
    np.testing.assert_array_equal(padded(hidden)[1], found[f"{tag}.masked"])


def test_preprocessor(golden: Callable[[str], Golden]) -> None:
    found = golden("preprocessor")
    raw = sp.csr_matrix(
        (found["raw_data"], found["raw_indices"], found["raw_indptr"]), shape=found["raw_shape"]
    )
    counts = raw[:, np.flatnonzero(np.asarray(raw.sum(axis=0)).ravel() >= 3)]
    np.testing.assert_array_equal(
        np.flatnonzero(np.asarray(raw.sum(axis=0)).ravel() >= 3), found["kept_genes"]
    )
    logged = np.log1p(counts.multiply(10_000 / counts.sum(axis=1)).toarray())
    np.testing.assert_allclose(logged, found["X_log1p"], rtol=1e-6)
    np.testing.assert_allclose(logged, found["X_normed"], rtol=1e-6)  # logged in place, in the original
    seed_all(int(found["np_seed"]))
    binned = bin_matrix(found["X_log1p"], binning="upstream")
    np.testing.assert_array_equal(binned.bins.toarray(), found["X_binned"])
    np.testing.assert_array_equal(binned.edges, found["bin_edges"])
    seeded = bin_matrix(found["X_log1p"]).bins.toarray()
    expressed = found["X_log1p"] > 0
    low = np.minimum(found["right"] + 1, found["left"])
    assert ((low <= seeded) & (seeded <= found["left"]))[expressed].all() and not seeded[~expressed].any()
