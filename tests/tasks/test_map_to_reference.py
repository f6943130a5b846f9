"""Reference mapping: exact search in any blocks, the authors' votes, what is written, and what is refused."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pytest

import scfm
from scfm.errors import (
    BadCellError,
    IntegrityError,
    InvalidArgumentError,
    MissingDependencyError,
    MissingFileError,
    ScfmWarning,
)
from scfm.tasks import neighbor_search
from scfm.tasks.label_votes import vote
from scfm.tasks.neighbor_search import Points, nearest_cells

BACKENDS = ["exact", "faiss"]


def need(backend: str) -> None:
    if backend == "faiss":
        pytest.importorskip("faiss")


def cells(num_cells: int, dimensions: int = 24, *, seed: int = 0) -> np.ndarray:
    """Points around a few centres, some of them twins."""
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(5, dimensions))
    points = centres[draw.integers(0, 5, num_cells)] + 0.3 * draw.normal(size=(num_cells, dimensions))
    points[num_cells // 2 :: 7] = points[0]
    return points.astype(np.float32)


def oracle(queries: np.ndarray, reference: np.ndarray, k: int, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """Every distance in float64, in a stable order."""
    q, r = queries.astype(np.float64), reference.astype(np.float64)
    if metric == "l2":
        distances = np.sqrt(((q[:, None] - r[None]) ** 2).sum(-1))
    else:
        lengths = np.sqrt((q**2).sum(1))[:, None] * np.sqrt((r**2).sum(1))[None]
        distances = 1 - np.divide(q @ r.T, lengths, out=np.zeros((len(q), len(r))), where=lengths > 0)
        distances = distances.round(12)  # equal rows give products that differ in their last bit
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return order, np.take_along_axis(distances, order, axis=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_search_is_exact_and_ties_go_by_the_references_order(metric: str, backend: str) -> None:
    need(backend)
    reference, queries = cells(900), np.concatenate([cells(60, seed=1), cells(3)])
    reference[5] = 0
    queries[7] = 0
    for k in (1, 10, 200):
        found, distances = nearest_cells(
            queries, Points.of(reference), num_neighbors=k, metric=metric, backend=backend
        )
        want, want_distances = oracle(queries, reference, k, metric)
        np.testing.assert_array_equal(found, want)
        np.testing.assert_allclose(distances, want_distances, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_do_not_matter(monkeypatch, backend: str) -> None:
    need(backend)
    reference, queries = cells(500), cells(70, seed=1)
    whole = nearest_cells(queries, Points.of(reference), num_neighbors=9, backend=backend)
    monkeypatch.setattr(neighbor_search, "_QUERIES_IN_HAND", 32)
    monkeypatch.setattr(neighbor_search, "_QUERIES_AT_ONCE", 8)
    monkeypatch.setattr(neighbor_search, "_REFERENCES_AT_ONCE", 37)
    for part in (slice(None), slice(0, 1), slice(33, 50)):
        found, distances = nearest_cells(
            queries[part], Points.of(reference), num_neighbors=9, backend="exact"
        )
        np.testing.assert_array_equal(found, whole[0][part])
        np.testing.assert_array_equal(distances, whole[1][part])


def test_products_that_prove_nothing_are_not_trusted() -> None:
    """Far from the origin float32 products lose what tells neighbours apart; the result does not."""
    reference, queries = cells(400) + 1000, cells(40, seed=1) + 1000
    found, distances = nearest_cells(queries, Points.of(reference), num_neighbors=5, backend="exact")
    want, want_distances = oracle(queries, reference, 5, "l2")
    np.testing.assert_array_equal(found, want)
    np.testing.assert_allclose(distances, want_distances, rtol=1e-12)


def test_a_reference_of_equal_cells_is_taken_in_order() -> None:
    reference = np.ones((300, 4), dtype=np.float32)
    found, distances = nearest_cells(reference[:3], Points.of(reference), num_neighbors=60)
    np.testing.assert_array_equal(found, np.tile(np.arange(60), (3, 1)))
    assert (distances == 0).all()


def test_search_refuses_what_it_cannot_do(monkeypatch) -> None:
    points = Points.of(cells(20))
    for wrong in ({"num_neighbors": 21}, {"num_neighbors": 0}, {"metric": "ip"}, {"backend": "annoy"}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            nearest_cells(cells(2), points, **{"num_neighbors": 3, **wrong})
    monkeypatch.setattr(neighbor_search, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match="faiss-cpu"):
        nearest_cells(cells(2), points, num_neighbors=3, backend="faiss")
    assert nearest_cells(cells(2)[:0], points, num_neighbors=3)[0].shape == (0, 3)


def test_a_folder_named_faiss_is_not_faiss(monkeypatch, tmp_path) -> None:
    (tmp_path / "nofaiss").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not neighbor_search._is_installed("nofaiss") and neighbor_search._is_installed("torch")


@pytest.mark.golden
def test_votes_are_the_authors(goldens) -> None:
    stored = np.load(goldens("scgpt") / "refmap.npz", allow_pickle=False)
    names, codes = np.unique(stored["labels"], return_inverse=True)
    neighbors, distances = codes[stored["idx"]].astype(np.int64), np.sqrt(stored["dist"].astype(np.float64))
    totals = np.bincount(codes)
    majority, _ = vote(neighbors, distances, totals, ties="last")
    np.testing.assert_array_equal(names[majority], stored["vote"])
    balanced, _ = vote(neighbors, distances, totals, weights="frequency", ties="last")
    np.testing.assert_array_equal(names[balanced], stored["weighted"])


@pytest.mark.golden
def test_search_agrees_with_faiss_of_the_goldens(goldens) -> None:
    """The queries are not stored, but they lie close to their own reference cell: its neighbours are nearly theirs."""
    stored = np.load(goldens("scgpt") / "refmap.npz", allow_pickle=False)
    found, distances = nearest_cells(stored["ref"], Points.of(stored["ref"]), num_neighbors=5)
    np.testing.assert_array_equal(found[:, 0], stored["idx"][:, 0])
    shift = np.sqrt(stored["dist"][:, :1])  # how far the stored query is from that cell
    assert (np.abs(distances[:, 1:] - np.sqrt(stored["dist"][:, 1:])) <= shift + 1e-6).all()


def test_votes_and_their_shares() -> None:
    codes = np.array([[0, 1, 1], [2, 0, 1], [1, 0, 0]])
    distances = np.array([[0.1, 1.0, 1.0], [0.5, 0.6, 0.7], [0.0, 0.2, 0.3]])
    totals = np.array([10, 100, 4])
    winner, share = vote(codes, distances, totals)
    assert winner.tolist() == [1, 2, 0]
    np.testing.assert_allclose(share, [2 / 3, 1 / 3, 2 / 3])
    assert vote(codes, distances, totals, ties="last")[0].tolist() == [1, 2, 0]
    assert vote(codes[:, ::-1], distances[:, ::-1], totals)[0].tolist() == [1, 1, 0]
    winner, share = vote(codes, distances, totals, weights="distance")
    assert winner.tolist() == [0, 2, 1]
    np.testing.assert_allclose(share, [10 / 12, 2 / (2 + 1 / 0.6 + 1 / 0.7), 1.0])
    winner, share = vote(codes, distances, totals, weights="frequency")
    assert winner.tolist() == [0, 2, 0]
    np.testing.assert_allclose(share[0], 0.1 / (0.1 + 2 / 100))
    for wrong in ({"weights": "rank"}, {"ties": "first"}):
        with pytest.raises(InvalidArgumentError, match=next(iter(wrong))):
            vote(codes, distances, totals, **wrong)


# ---- AnnData ----------------------------------------------------------------------------------------------------


def annotated(num_cells: int, *, seed: int = 0, key: str = "X_scgpt") -> ad.AnnData:
    adata = ad.AnnData(np.zeros((num_cells, 1), dtype=np.float32))
    adata.obsm[key] = cells(num_cells, seed=seed)
    centres = np.random.default_rng(99).normal(size=(5, 24))
    nearest = ((adata.obsm[key][:, None] - centres) ** 2).sum(-1).argmin(1)
    adata.obs["kind"] = [f"kind{i}" for i in nearest]
    return adata


def test_writes_labels_with_what_they_rest_on(tmp_path) -> None:
    query, reference = annotated(50, seed=1), annotated(200)
    assert scfm.tl.map_to_reference(query, reference, labels="kind") is None
    assert (query.obs["mapped_kind"].astype(str) == query.obs["kind"]).all()
    assert query.obsm["mapped_kind_neighbors"].shape == query.obsm["mapped_kind_distances"].shape == (50, 10)
    want, _ = oracle(query.obsm["X_scgpt"], reference.obsm["X_scgpt"], 10, "l2")
    np.testing.assert_array_equal(query.obsm["mapped_kind_neighbors"], want)
    assert (query.obs["mapped_kind_confidence"] == 1).all()
    query.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad")
    facts = again.uns["scfm"]["mapped_kind"]
    assert (facts["num_neighbors"], facts["metric"], facts["num_reference_cells"]) == (10, "l2", 200)
    assert not facts["same_model_checked"] and "max_distance" not in facts
    assert list(again.obs["mapped_kind"].cat.categories) == sorted(reference.obs["kind"].unique())


def test_a_copy_leaves_the_input_alone() -> None:
    query = annotated(20, seed=1)
    copy = scfm.tl.map_to_reference(query, annotated(99), labels="kind", key_added="type", copy=True)
    assert "type" in copy.obs and "type" not in query.obs and "scfm" not in query.uns


def test_far_and_divided_cells_can_be_left_unassigned() -> None:
    query, reference = annotated(40, seed=1), annotated(200)
    query.obsm["X_scgpt"][3] += 100
    middle = query.obsm["X_scgpt"].copy()
    scfm.tl.map_to_reference(query, reference, labels="kind", max_distance=10.0)
    assert (
        query.obs["mapped_kind"].iloc[3] == "Unassigned"
        and (query.obs["mapped_kind"] == "Unassigned").sum() == 1
    )
    assert query.uns["scfm"]["mapped_kind"]["num_unassigned"] == 1
    reference.obs["kind"] = [f"kind{i % 2}" for i in range(200)]
    query.obsm["X_scgpt"] = middle
    scfm.tl.map_to_reference(query, reference, labels="kind", min_confidence=0.8)
    divided = query.obs["mapped_kind_confidence"] < 0.8
    assert divided.any() and ((query.obs["mapped_kind"] == "Unassigned") == divided).all()


def test_cells_without_an_embedding() -> None:
    query, reference = annotated(30, seed=1), annotated(100)
    query.obsm["X_scgpt"][4] = np.nan
    reference.obsm["X_scgpt"][17] = np.inf
    with pytest.raises(BadCellError, match="row 4"):
        scfm.tl.map_to_reference(query, reference, labels="kind")
    scfm.tl.map_to_reference(query, reference, labels="kind", on_bad_cell="nan", num_neighbors=99)
    assert query.obs["mapped_kind"].iloc[4] == "Unassigned" and np.isnan(
        query.obs["mapped_kind_confidence"].iloc[4]
    )
    assert (query.obsm["mapped_kind_neighbors"][4] == -1).all()
    assert np.isnan(query.obsm["mapped_kind_distances"][4]).all()
    assert 17 not in query.obsm["mapped_kind_neighbors"][0] and 99 in query.obsm["mapped_kind_neighbors"][0]


def test_unlabelled_reference_cells_do_not_vote() -> None:
    query, reference = annotated(30, seed=1), annotated(100)
    reference.obs.loc["10", "kind"] = None
    with pytest.warns(ScfmWarning, match="1 of 100"):
        scfm.tl.map_to_reference(query, reference, labels="kind", num_neighbors=99)
    assert 10 not in query.obsm["mapped_kind_neighbors"]
    reference.obs["kind"] = None
    with pytest.raises(InvalidArgumentError, match="embedding and a label"):
        scfm.tl.map_to_reference(query, reference, labels="kind")


def test_labels_may_be_given_as_a_list() -> None:
    query, reference = annotated(30, seed=1), annotated(100)
    scfm.tl.map_to_reference(query, reference, labels=list(reference.obs["kind"]))
    assert (query.obs["mapped_label"].astype(str) == query.obs["kind"]).all()
    with pytest.raises(InvalidArgumentError, match="99 for 100"):
        scfm.tl.map_to_reference(query, reference, labels=list(reference.obs["kind"])[1:])


def test_what_cannot_be_compared_is_refused() -> None:
    query, reference = annotated(30, seed=1), annotated(100)
    with pytest.raises(InvalidArgumentError, match=r"'type'.*'kind'"):
        scfm.tl.map_to_reference(query, reference, labels="type")
    with pytest.raises(InvalidArgumentError, match="X_other"):
        scfm.tl.map_to_reference(query, reference, labels="kind", use_rep="X_other")
    with pytest.raises(InvalidArgumentError, match="reference: is a ndarray"):
        scfm.tl.map_to_reference(query, reference.obsm["X_scgpt"], labels="kind")
    with pytest.raises(MissingFileError, match="nowhere"):
        scfm.tl.map_to_reference(query, "nowhere", labels="kind")
    for limit in ({"max_distance": -1.0}, {"min_confidence": float("nan")}):
        with pytest.raises(InvalidArgumentError, match=next(iter(limit))):
            scfm.tl.map_to_reference(query, reference, labels="kind", **limit)
    short = annotated(30)
    short.obsm["X_scgpt"] = short.obsm["X_scgpt"][:, :9]
    with pytest.raises(InvalidArgumentError, match=r"9 dimensions.*24"):
        scfm.tl.map_to_reference(short, reference, labels="kind")


@pytest.mark.parametrize(("fact", "other"), [("weights_sha256", "bb"), ("layer", -1), ("pooling", "mean")])
def test_embeddings_of_different_models_are_refused(fact: str, other: object) -> None:
    query, reference = annotated(30, seed=1), annotated(100)
    facts = {"family": "scgpt", "weights_sha256": "aa", "layer": 0, "pooling": "cls"}
    query.uns["scfm"], reference.uns["scfm"] = {"X_scgpt": facts}, {"X_scgpt": {**facts, fact: other}}
    with pytest.raises(IntegrityError, match=fact):
        scfm.tl.map_to_reference(query, reference, labels="kind")
    reference.uns["scfm"] = {"X_scgpt": facts}
    scfm.tl.map_to_reference(query, reference, labels="kind")
    assert query.uns["scfm"]["mapped_kind"]["same_model_checked"]


def test_a_model_embeds_what_is_not_embedded_yet(tiny_model, tiny_adata) -> None:
    query, reference = tiny_adata[:15].copy(), tiny_adata[15:].copy()
    scfm.tl.map_to_reference(query, reference, labels="kind", model=tiny_model, num_neighbors=5)
    np.testing.assert_array_equal(query.obsm["X_geneformer"], tiny_model.embed(query))
    want, _ = oracle(query.obsm["X_geneformer"], tiny_model.embed(reference), 5, "l2")
    np.testing.assert_array_equal(query.obsm["mapped_kind_neighbors"], want)
    assert set(query.uns["scfm"]) == {"X_geneformer", "mapped_kind"}
    # Weights in memory have no checksum to compare.
    assert not query.uns["scfm"]["mapped_kind"]["same_model_checked"]


def test_the_reference_may_be_a_folder_of_embeddings(tiny_model, tiny_adata, tmp_path) -> None:
    from scfm.embed.run import embed_to_folder

    query, reference = tiny_adata[:15].copy(), tiny_adata[15:].copy()
    reference.write_h5ad(tmp_path / "reference.h5ad")
    model = scfm.load(tiny_model.save(tmp_path / "model"), dtype="float32")
    embed_to_folder([tmp_path / "reference.h5ad"], model, tmp_path / "out", shard_size=7)
    in_memory = scfm.tl.map_to_reference(query, reference, labels="kind", model=model, copy=True)
    scfm.tl.map_to_reference(query, tmp_path / "out", labels="kind", model=model)
    for key in ("mapped_kind_neighbors", "mapped_kind_distances"):
        np.testing.assert_array_equal(query.obsm[key], in_memory.obsm[key])
    assert (query.obs["mapped_kind"] == in_memory.obs["mapped_kind"]).all()
    with pytest.raises(InvalidArgumentError, match="'kind'"):
        scfm.tl.map_to_reference(query, tmp_path / "out", labels="type", model=model)
    scfm.tl.embed(query, model, pooling="mean", key_added="X_geneformer")
    with pytest.raises(IntegrityError, match="pooling"):
        scfm.tl.map_to_reference(query, tmp_path / "out", labels="kind", use_rep="X_geneformer")


def test_the_report_shows_the_baselines(tiny_model, tiny_adata) -> None:
    query, reference = tiny_adata[:15].copy(), tiny_adata[15:].copy()
    scfm.tl.map_to_reference(query, reference, labels="kind", model=tiny_model, num_neighbors=5)
    report = scfm.tl.mapping_report(query, reference, labels="kind")
    assert [row.name for row in report.rows] == [
        "mapped by X_geneformer",
        "kNN on PCA-50",
        "kNN on raw HVG",
        "commonest label",
    ]
    right = (query.obs["mapped_kind"].astype(str) == query.obs["kind"].astype(str)).mean()
    assert report.ours.values["accuracy"] == pytest.approx(right)
    assert report.rows[1].values["accuracy"] > 0.8  # kinds of cells are easy to tell by their genes
    assert (report.num_train, report.num_test) == (25, 15)
    assert "kNN on PCA-50" in report.to_text()
    query.var_names = [f"other{i}" for i in range(query.n_vars)]
    with pytest.raises(scfm.ScfmError, match="gene names"):
        scfm.tl.mapping_report(query, reference, labels="kind")
    with pytest.raises(InvalidArgumentError, match="map_to_reference"):
        scfm.tl.mapping_report(query, reference, labels="kind", key="kind")


@pytest.mark.data
def test_mapping_by_the_baselines_own_embedding_scores_what_it_scores(data_file) -> None:
    from scipy import sparse

    from scfm.evaluate import expression_baselines

    adata = ad.read_h5ad(data_file("pbmc3k_labeled.h5ad"))
    counts = sparse.csr_matrix(adata.X)
    held_out = np.arange(adata.n_obs) % 2 == 1
    found = expression_baselines(
        counts.indptr, counts.indices, counts.data, counts.shape[1], np.flatnonzero(~held_out)
    )
    adata.obsm["X_pca"] = found["PCA-50"]
    query, reference = adata[held_out].copy(), adata[~held_out].copy()
    scfm.tl.map_to_reference(query, reference, labels="cell_type", use_rep="X_pca")
    ours, pca, *_ = scfm.tl.mapping_report(query, reference, labels="cell_type").rows
    assert ours.values == pca.values and ours.values["accuracy"] > 0.8
