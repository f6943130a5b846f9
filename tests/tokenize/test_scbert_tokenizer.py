"""scBERT's tokenizer: the authors' tokens, alignment by symbol, the filter that reports, values that are no counts."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import scfm
from scfm.errors import FormatError, GeneMappingError, InvalidArgumentError, MissingFileError, NotCountsError
from scfm.tokenize.scbert import AUTHORS_MIN_GENES, ScbertTokenizer
from scfm.tokenize.scbert_panel import ScbertPanel

PANEL = ["CD3E", "MS4A1", "NKG7", "LYZ", "PPBP", "GNLY", "CD8A", "IL7R"]


def cells(counts: object, genes: list[str] = PANEL, **var: object) -> ad.AnnData:
    matrix = sp.csr_matrix(np.asarray(counts, dtype=np.float32))
    return ad.AnnData(matrix, var=pd.DataFrame(var, index=pd.Index(genes)))


def dense(packed: scfm.PackedCells, num_positions: int) -> np.ndarray:
    out = np.zeros((packed.num_cells, num_positions), dtype=np.int64)
    cell = np.repeat(np.arange(packed.num_cells), packed.lengths.numpy())
    out[cell, packed.token_ids.numpy()] = packed.values.numpy().astype(np.int64)
    return out


@pytest.mark.golden
class TestGoldens:
    @pytest.fixture(scope="class")
    def expected(self, goldens):
        return np.load(goldens("scbert") / "preprocess.npz")

    @pytest.fixture(scope="class")
    def data(self, expected) -> ad.AnnData:
        parts = (expected["counts_data"], expected["counts_indices"], expected["counts_indptr"])
        matrix = sp.csr_matrix(parts, shape=expected["counts_shape"]).astype(np.float32)
        return ad.AnnData(
            matrix,
            var=pd.DataFrame(index=expected["gene_symbols"]),
            obs=pd.DataFrame(index=expected["cell_names"]),
        )

    @pytest.fixture(scope="class")
    def order(self, goldens):
        return goldens("scbert") / "panglao_gene_order_16906.txt"

    def test_tokens_and_filter(self, expected, data, order) -> None:
        tokenizer = scfm.ScbertTokenizer(order, min_genes=AUTHORS_MIN_GENES)
        with pytest.warns(scfm.ScfmWarning, match="1 cells with fewer than 200 genes"):
            packed = tokenizer(data)
        assert packed.cell_ids.tolist() == expected["kept_index"].tolist()
        assert np.array_equal(dense(packed, 16_907), expected["tokens"])
        assert tokenizer.report.coverage.num_mapped == int(expected["n_matched"])
        assert tokenizer.report.num_tokens == packed.num_tokens

    def test_without_the_filter_every_cell_stays(self, expected, data, order) -> None:
        packed = scfm.ScbertTokenizer(order)(data)
        assert packed.num_cells == data.n_obs
        kept = packed.select(expected["kept_index"])
        assert np.array_equal(dense(kept, 16_907), expected["tokens"])

    def test_normalised_values_give_the_same_bins(self, expected, data, order) -> None:
        linear = data.copy()
        total = expected["totals_over_panel"][:, None]
        linear.X = sp.csr_matrix(linear.X.multiply(1234.5 / total).astype(np.float32))
        with (
            pytest.warns(scfm.ScfmWarning, match="were taken as counts"),
            pytest.warns(scfm.ScfmWarning, match="taken as linear"),
        ):
            packed = scfm.ScbertTokenizer(order)(linear, assume_counts=True)
        found, wanted = dense(packed.select(expected["kept_index"]), 16_907), expected["tokens"]
        # A value that meets an edge exactly may fall on its other side once it was multiplied in float32.
        assert (found != wanted).mean() < 1e-4
        assert np.abs(found - wanted).max() <= 1

    @pytest.mark.parametrize(("style", "unit"), [("log2", 1.0), ("log1p", np.log(2))])
    def test_logarithms(self, expected, order, style: str, unit: float) -> None:
        parts = (expected["norm_data"], expected["norm_indices"], expected["norm_indptr"])
        logged = sp.csr_matrix(parts, shape=expected["norm_shape"])
        data = ad.AnnData(
            logged * np.float32(unit), var=pd.DataFrame(index=ScbertPanel.from_file(order).genes)
        )
        found = dense(scfm.ScbertTokenizer(order, input_style=style)(data), 16_907)
        assert (found != expected["tokens"]).mean() < (1e-9 if style == "log2" else 1e-4)

    def test_bin_edges(self, goldens) -> None:
        edges = np.load(goldens("scbert") / "bin_edges.npz")
        counts = np.stack([edges["count"], edges["total"] - edges["count"]], axis=1)
        data = ad.AnnData(sp.csr_matrix(counts.astype(np.float64)), var=pd.DataFrame(index=["CD3E", "MS4A1"]))
        packed = scfm.ScbertTokenizer(["CD3E", "MS4A1"])(data)
        assert np.array_equal(dense(packed, 3)[:, 0], edges["token"])


@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_first_of_equal_symbols_is_taken() -> None:
    data = cells([[0, 5, 7, 1], [9, 0, 2, 1]], ["MS4A1", "CD3E", "CD3E", "LYZ"])
    tokenizer = ScbertTokenizer(PANEL)
    with pytest.warns(scfm.ScfmWarning, match="1 columns bear the symbol of an earlier column"):
        packed = tokenizer(data)
    assert packed.token_ids[: packed.lengths[0]].tolist() == [0, 3]
    assert tokenizer.report.coverage.num_mapped == 4


def test_ensembl_ids_and_mice() -> None:
    human = cells([[3, 1]], ["ENSG00000198851", "ENSG00000156738"])
    assert ScbertTokenizer(PANEL)(human).token_ids.tolist() == [0, 1]
    mouse = cells([[3, 1]], ["Cd3e", "Ms4a1"])
    assert ScbertTokenizer(PANEL)(mouse, species="mouse").token_ids.tolist() == [0, 1]
    with pytest.raises(GeneMappingError):
        ScbertTokenizer(PANEL)(cells([[3, 1]], ["X1", "X2"]))


def test_cells_without_panel_genes_are_left_out() -> None:
    tokenizer = ScbertTokenizer(PANEL[:2])
    with pytest.warns(scfm.ScfmWarning, match=r"25.0% of counts"):
        packed = tokenizer(cells(np.diag([5.0] * 8)))
    assert packed.cell_ids.tolist() == [0, 1]
    assert tokenizer.report.num_empty == 6


def test_a_cell_whose_bins_are_all_zero_keeps_its_slot() -> None:
    genes = [f"G{number}" for number in range(20_000)]
    even = sp.csr_matrix(np.full((1, len(genes)), 3.0, dtype=np.float32))
    packed = ScbertTokenizer(genes)(ad.AnnData(even, var=pd.DataFrame(index=genes)))
    assert packed.token_ids.tolist() == [len(genes)]
    assert packed.values.tolist() == [0.0]


def test_order_and_blocks_change_nothing() -> None:
    rng = np.random.default_rng(0)
    data = cells(rng.poisson(0.6, (300, 8)) * rng.integers(1, 9, (300, 8)))
    tokenizer = ScbertTokenizer(PANEL)
    whole = tokenizer(data)
    parts = list(tokenizer.packs(scfm.read(data), block_size=7))
    assert sum(part.num_cells for part in parts) == whole.num_cells
    assert np.array_equal(np.concatenate([part.values.numpy() for part in parts]), whole.values.numpy())
    shuffled = np.random.default_rng(1).permutation(whole.cell_ids.numpy())
    again = tokenizer(data[shuffled])
    for place, row in enumerate(shuffled[:20]):
        mine = again.select([place])
        its = whole.select(np.flatnonzero(whole.cell_ids.numpy() == row))
        assert mine.token_ids.tolist() == its.token_ids.tolist()
        assert mine.values.tolist() == its.values.tolist()


def test_logarithms_are_no_counts() -> None:
    counts = np.random.default_rng(2).poisson(3.0, (30, 8)).astype(np.float32)
    logged = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4)
    with pytest.raises(NotCountsError, match="log1p"):
        ScbertTokenizer(PANEL)(cells(logged))
    with (
        pytest.warns(scfm.ScfmWarning, match="were taken as counts"),
        pytest.warns(scfm.ScfmWarning, match=r"log1p.*every bin is wrong.*input_style='log1p'"),
    ):
        ScbertTokenizer(PANEL)(cells(logged), assume_counts=True)


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"min_genes": 0}, "min_genes"),
        ({"input_style": "ln"}, "input_style"),
        ({"gene_rules": "x"}, "gene_rules"),
    ],
)
def test_wrong_options(options, where: str) -> None:
    with pytest.raises(InvalidArgumentError, match=where):
        ScbertTokenizer(PANEL, **options)


def test_panels(tmp_path) -> None:
    listed = tmp_path / "genes.txt"
    listed.write_text("\n".join(PANEL) + "\n", encoding="utf-8")
    table = tmp_path / "panglao_human.h5ad"
    cells(np.eye(8)).write_h5ad(table)
    assert ScbertPanel.of(listed).genes == ScbertPanel.of(table).genes == ScbertPanel.of(PANEL).genes == PANEL
    assert ScbertPanel.beside(tmp_path).source == str(listed)
    assert ScbertPanel.beside(tmp_path / "nowhere") is None
    with pytest.raises(FormatError, match="twice"):
        ScbertPanel(["A", "B", "A"])
    with pytest.raises(FormatError, match="no names"):
        ScbertPanel(["A", ""])
    with pytest.raises(MissingFileError):
        ScbertPanel.of(tmp_path / "absent.txt")
    (tmp_path / "bytes.txt").write_bytes(bytes(range(256)))
    with pytest.raises(FormatError, match="no text"):
        ScbertPanel.of(tmp_path / "bytes.txt")
    with pytest.raises(InvalidArgumentError, match="genes"):
        ScbertPanel.of(3)
