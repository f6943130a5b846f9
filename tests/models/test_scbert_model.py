"""scBERT's model: a cell's bits in any company, layer 0 from the expressed genes, redraws, wrong input, embeddings."""

from __future__ import annotations

import copy

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F

import scfm
from models.scbert_goldens import in_float64, largest, pack
from scfm.errors import BadCellError, InvalidArgumentError
from scfm.models.nn.performer import Performer, PerformerShape
from scfm.models.nn.projections import draw_projection, next_projection
from scfm.models.scbert import model as model_file
from scfm.models.scbert.annotate import predict_cell_types
from scfm.models.scbert.config import ScbertConfig
from scfm.models.scbert.model import Scbert
from scfm.models.scbert.zero_genes import ZeroGenes
from scfm.tokenize.scbert_panel import ScbertPanel

GENES = [f"GENE{number}" for number in range(150)]
SHAPE = {"num_genes": 150, "hidden_size": 24, "num_layers": 3, "num_heads": 3, "num_features": 70}


def make(seed: int = 1, **changes: object) -> Scbert:
    return Scbert.from_config(ScbertConfig(**(SHAPE | changes)), ScbertPanel(GENES), seed=seed)


def sparse_tokens(
    num_cells: int, num_expressed: int = 15, num_positions: int = 151, seed: int = 0
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    tokens = np.zeros((num_cells, num_positions), dtype=np.int64)
    for cell in tokens:
        cell[rng.choice(num_positions - 1, num_expressed, replace=False)] = rng.integers(1, 6, num_expressed)
    return tokens


@pytest.fixture
def long_panel(monkeypatch) -> None:
    """Every panel counts as long: layer 0 is computed from the expressed genes."""
    monkeypatch.setattr(model_file, "_LONG_PANEL", 0)
    monkeypatch.setattr(model_file, "_ROWS_AT_ONCE", 1)


def forward(model: Scbert, tokens: np.ndarray, **options: object) -> torch.Tensor:
    with torch.inference_mode():
        return model.forward(pack(tokens), **options).hidden


class TestCompany:
    """Whoever else is in the batch, in whatever order: a cell's bits are its own."""

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    @pytest.mark.parametrize("zero_genes", [True, False])
    def test_permuted_alone_together(self, request, dtype: str, zero_genes: bool) -> None:
        if zero_genes:
            request.getfixturevalue("long_panel")
        model = make(num_classes=3, has_bin_head=True).set_compute_dtype(dtype)
        tokens = sparse_tokens(9)
        tokens[3] = sparse_tokens(1, 100, seed=4)
        order = np.random.default_rng(2).permutation(9)
        with torch.inference_mode():
            whole, mixed = model.forward(pack(tokens)), model.forward(pack(tokens[order]))
            for name in ("by_cell", "cls"):
                assert torch.equal(getattr(whole, name)[order], getattr(mixed, name))
            logits = whole.logits.view(9, 151, 7)
            assert torch.equal(logits[order], mixed.logits.view(9, 151, 7))
            for cell in range(9):
                alone = model.forward(pack(tokens[cell : cell + 1]))
                assert torch.equal(alone.by_cell[0], whole.by_cell[cell])
                assert torch.equal(alone.cls[0], whole.cls[cell])
                assert torch.equal(alone.logits, logits[cell])

    @pytest.mark.parametrize("pooling", ["gene_mean", "mean", "last"])
    def test_embeddings(self, pooling: str) -> None:
        model, tokens = make(), sparse_tokens(7)
        whole = model.embed(pack(tokens), pooling=pooling)
        assert np.array_equal(model.embed(pack(tokens), pooling=pooling, token_budget=1), whole)
        assert np.array_equal(model.embed(pack(tokens[::-1]), pooling=pooling)[::-1], whole)

    def test_threads(self) -> None:
        model, tokens = make(), sparse_tokens(4)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            one = forward(model, tokens)
            torch.set_num_threads(2)
            assert torch.equal(forward(model, tokens), one)
        finally:
            torch.set_num_threads(before)

    def test_the_authors_reading_does_depend_on_it(self) -> None:
        model, tokens = make(), sparse_tokens(4)
        alone = forward(model, tokens[:1], kmax_scope="batch")
        assert largest(alone, forward(model, tokens[:1])) < 1e-5
        assert largest(forward(model, tokens, kmax_scope="batch")[:151], alone) > 1e-5


class TestZeroGenes:
    """Layer 0 from the expressed genes equals layer 0 of all genes."""

    def compare(self, model: Scbert, tokens: np.ndarray, tolerance: float) -> None:
        found = forward(model, tokens)
        model_file._LONG_PANEL = 10**9
        assert largest(found, forward(model, tokens)) <= tolerance

    @pytest.mark.parametrize("num_expressed", [0, 1, 15, 37, 38, 150])
    @pytest.mark.parametrize(
        "variant", [{}, {"qkv_bias": True}, {"norm": "rezero"}, {"norm": "scale"}], ids=str
    )
    def test_equal(self, long_panel, num_expressed: int, variant: dict[str, object]) -> None:
        tokens = sparse_tokens(2, num_expressed)
        if not num_expressed:
            tokens[0, 4] = 2
        self.compare(in_float64(make(**variant)), tokens, 1e-11)

    def test_equal_in_float32_and_bfloat16(self, long_panel) -> None:
        model = make()
        self.compare(model, sparse_tokens(3), 2e-5)
        model_file._LONG_PANEL = 0
        self.compare(model.set_compute_dtype("bfloat16"), sparse_tokens(3), 0.05)

    def test_masked_bins_and_the_slot(self, long_panel) -> None:
        tokens = sparse_tokens(2)
        tokens[0, 3], tokens[1, 150] = 6, 2
        self.compare(in_float64(make()), tokens, 1e-11)

    def test_bfloat16_computes_the_layer_in_the_ordinary_way(self) -> None:
        """There the native kernel takes less time for all positions than the constants' sums would."""
        model = make().set_compute_dtype("bfloat16")
        forward(model, sparse_tokens(1))
        assert model._zero_genes._kept is None

    def test_the_largest_key_is_an_expressed_gene(self, long_panel, monkeypatch) -> None:
        """Its part cannot be taken out of the sums without loss, so the layer is computed in the ordinary way."""
        model = in_float64(make())
        with torch.no_grad():
            model.performer.blocks()[0].attention.to_k.weight.mul_(4)
            model.token_emb.weight[2] = 0
        tokens = sparse_tokens(1)
        forward(model, tokens)
        constants = model._zero_genes._kept[1]
        where = int(constants.key_max.argmax())
        others = constants.key_max.index_fill(0, torch.tensor([where]), -torch.inf)
        assert constants.maximum - float(others.max()) > 1.0, "another gene's key is nearly as large"
        answers = []
        attend = ZeroGenes.attend
        monkeypatch.setattr(
            ZeroGenes, "attend", lambda *arguments: answers.append(attend(*arguments)) or answers[-1]
        )
        tokens[0], tokens[0, where] = 0, 2
        self.compare(model, tokens, 1e-10)
        assert answers == [None]

    def test_constants_follow_the_weights(self, long_panel) -> None:
        model, tokens = make(), sparse_tokens(2)
        before = forward(model, tokens)
        for weight in (
            model.token_emb.weight,
            model.pos_emb,
            model.performer.blocks()[0].attention.to_v.weight,
            model.performer.blocks()[0].attention.projection_matrix,
            model.performer.blocks()[0].attention_norm.bias,
        ):
            with torch.no_grad():
                weight += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
            after = forward(model, tokens)
            assert largest(after, before) > 1e-4
            fresh = copy.deepcopy(model)
            assert torch.equal(forward(fresh, tokens), after)
            before = after

    def test_copies_do_not_share_constants(self, long_panel) -> None:
        model, tokens = make(), sparse_tokens(1)
        before = forward(model, tokens)
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.token_emb.weight.mul_(2)
        assert largest(forward(other, tokens), before) > 1e-3
        assert torch.equal(forward(model, tokens), before)


class TestRedraw:
    SHAPE = PerformerShape(hidden_size=8, num_heads=2, num_layers=2, head_dim=16)

    def performer(self) -> Performer:
        performer = Performer(self.SHAPE)
        performer.initialise(torch.Generator().manual_seed(0), seed=3)
        return performer

    def test_rows(self) -> None:
        matrix = draw_projection(266, 64, seed=0, layer=0)
        for block in matrix.split(64):
            unit = F.normalize(block, dim=1)
            assert largest(unit @ unit.T, torch.eye(len(block))) < 1e-5
        lengths = torch.cat([draw_projection(266, 64, seed=s, layer=0).norm(dim=1) for s in range(20)])
        # chi with 64 degrees of freedom
        assert float(lengths.mean()) == pytest.approx(7.969, abs=0.05)
        assert float(lengths.std()) == pytest.approx(0.706, abs=0.05)

    def test_keys(self) -> None:
        first = draw_projection(30, 16, seed=0, layer=0)
        torch.rand(3)
        assert torch.equal(draw_projection(30, 16, seed=0, layer=0), first)
        assert not torch.equal(draw_projection(30, 16, seed=1, layer=0), first)
        assert not torch.equal(draw_projection(30, 16, seed=0, layer=1), first)
        second = next_projection(first, seed=0, layer=0)
        assert torch.equal(second, next_projection(first, seed=0, layer=0))
        assert not torch.equal(second, next_projection(second, seed=0, layer=0))

    def test_every_thousand_and_first_forward_in_training(self) -> None:
        performer, hidden = self.performer(), torch.randn(20, 8)
        offsets = torch.tensor([0, 20], dtype=torch.int32)
        matrices = [block.attention.projection_matrix for block in performer.blocks()]
        before = [matrix.clone() for matrix in matrices]
        performer.calls_since_last_redraw.fill_(998)
        performer.train()
        for count in (999, 1000):
            performer(hidden, offsets)
            assert int(performer.calls_since_last_redraw) == count
            assert all(torch.equal(a, b) for a, b in zip(matrices, before, strict=True))
        performer(hidden, offsets)
        assert int(performer.calls_since_last_redraw) == 0
        assert not any(torch.equal(a, b) for a, b in zip(matrices, before, strict=True))
        assert not torch.equal(*matrices)

    def test_never_in_evaluation_or_when_switched_off(self) -> None:
        performer, hidden = self.performer().eval(), torch.randn(20, 8)
        offsets = torch.tensor([0, 20], dtype=torch.int32)
        performer.calls_since_last_redraw.fill_(1000)
        performer(hidden, offsets)
        assert int(performer.calls_since_last_redraw) == 1000
        performer.train().redraw_interval = None
        performer(hidden, offsets)
        assert int(performer.calls_since_last_redraw) == 1000

    def test_interrupted_training_draws_the_same(self) -> None:
        straight, resumed = self.performer(), Performer(self.SHAPE)
        straight.redraw()
        resumed.load_state_dict(straight.state_dict())
        straight.redraw()
        resumed.redraw()
        for a, b in zip(straight.blocks(), resumed.blocks(), strict=True):
            assert torch.equal(a.attention.projection_matrix, b.attention.projection_matrix)


class TestWrongInput:
    @pytest.mark.parametrize(
        ("tokens", "values", "message"),
        [
            ([[1], [151]], [[1], [1]], "cell 1 has position 151; this model's panel has 150 genes"),
            ([[1], [-1]], [[1], [1]], "cell 1 has position -1"),
            ([[1, 2]], [[1, 7]], "value 7 at position 2"),
            ([[1, 2]], [[1, 0.5]], "value 0.5"),
            ([[1, 2]], [[1, float("nan")]], "value nan"),
            ([[1], [2, 2]], [[1], [1, 2]], "cell 1 has position 2 more than once"),
            ([[1]], None, "no values"),
        ],
    )
    def test_packs(self, tokens, values, message: str) -> None:
        with pytest.raises(InvalidArgumentError, match=message):
            make().forward(scfm.PackedCells.from_lists(tokens, values))

    def test_panels(self) -> None:
        with pytest.raises(InvalidArgumentError, match="149 genes"):
            Scbert(ScbertConfig(**SHAPE), ScbertPanel(GENES[:-1]))
        with pytest.raises(InvalidArgumentError, match="149 genes"):
            make().tokenizer = scfm.ScbertTokenizer(GENES[:-1])
        model = Scbert.from_config(ScbertConfig(**SHAPE))
        with pytest.raises(InvalidArgumentError, match="gene order"):
            _ = model.tokenizer

    @pytest.mark.parametrize("layer", [1, -4, True, "last"])
    def test_layers(self, layer) -> None:
        with pytest.raises(InvalidArgumentError, match="layer"):
            make().embed(pack(sparse_tokens(1)), layer=layer)

    def test_poolings_and_heads(self) -> None:
        model = make()
        with pytest.raises(InvalidArgumentError, match="gene_mean"):
            model.embed(pack(sparse_tokens(1)), pooling="cls")
        with pytest.raises(InvalidArgumentError, match="annotation head"):
            _ = model.forward(pack(sparse_tokens(1))).cls
        with pytest.raises(InvalidArgumentError, match="annotation head"):
            predict_cell_types(model, pack(sparse_tokens(1)))
        model.add_annotation_head(["A", "B"])
        with pytest.raises(InvalidArgumentError, match="unassigned_below"):
            predict_cell_types(model, pack(sparse_tokens(1)), unassigned_below=2.0)


@pytest.fixture
def adata() -> ad.AnnData:
    counts = np.random.default_rng(3).poisson(0.4, (12, 150)).astype(np.float32)
    return ad.AnnData(sp.csr_matrix(counts), var=pd.DataFrame(index=GENES))


class TestUses:
    def test_tl_embed(self, adata) -> None:
        model = make()
        scfm.tl.embed(adata, model)
        assert np.array_equal(adata.obsm["X_scbert"], model.embed(model.tokenize(adata)))
        assert adata.uns["scfm"]["X_scbert"]["pooling"] == "gene_mean"

    def test_cells_without_counts(self, adata) -> None:
        counts = adata.X.tolil()
        counts[4] = 0
        adata.X = counts.tocsr()
        model = make()
        with pytest.raises(BadCellError, match="row"):
            model.embed(adata)
        found = model.embed(adata, on_bad_cell="nan")
        assert np.isnan(found).any(axis=1).tolist() == [row == 4 for row in range(12)]

    def test_layers_and_states(self) -> None:
        model, cells = make(), pack(sparse_tokens(3))
        with torch.inference_mode():
            states = model.forward(cells, output_hidden_states=True).hidden_states
        for layer in (-1, -3):
            wanted = states[3 + layer].view(3, 151, 24)[:, :-1].mean(dim=1)
            assert largest(model.embed(cells, layer=layer), wanted) < 1e-5
        rows = torch.repeat_interleave(torch.arange(3), cells.lengths) * 151 + cells.token_ids
        with torch.inference_mode():
            assert torch.equal(model.hidden_at(cells, -1), states[2][rows])

    def test_gene_embeddings(self) -> None:
        model, cells = make(), pack(sparse_tokens(5, 100))
        genes, table = model.gene_embeddings()
        assert genes == GENES
        assert np.array_equal(table, model.pos_emb[:-1].numpy())
        names, states = model.gene_embeddings(cells)
        with torch.inference_mode():
            hidden = model.forward(cells).by_cell
        expressed = torch.zeros(5, 151, dtype=torch.bool)
        expressed[torch.repeat_interleave(torch.arange(5), cells.lengths), cells.token_ids.long()] = True
        place = GENES.index(names[7])
        wanted = hidden[expressed[:, place], place].mean(dim=0)
        assert largest(states[7], wanted) < 1e-5

    def test_annotation(self, adata) -> None:
        model = make()
        model.add_annotation_head(["B", "NK", "T"])
        found = predict_cell_types(model, adata, unassigned_below=1.0)
        assert set(found.labels) == {"Unassigned"}
        found = predict_cell_types(model, adata)
        assert found.labels.tolist() == [
            ["B", "NK", "T"][best] for best in found.probabilities.argmax(axis=1)
        ]
        assert largest(found.probabilities.sum(axis=1), np.ones(12)) < 1e-6

    def test_a_cell_takes_less_than_300_mb(self) -> None:
        """A real panel, by what torch allocates at its peak; two layers need as much as six."""
        from torch.profiler import ProfilerActivity, profile

        model = Scbert.from_config(ScbertConfig(num_genes=16_906, num_layers=2))
        cells = pack(sparse_tokens(1, 1000, 16_907))
        with torch.inference_mode():
            model.embed_batch(cells, layer=0, pooling="gene_mean")
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
                model.embed_batch(cells, layer=0, pooling="gene_mean")
        held = peak = 0
        for event in recorded.profiler.kineto_results.events():
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        constants = model._zero_genes._kept[1]
        kept = constants.q.nbytes + constants.hidden.nbytes + constants.sums.products.nbytes
        assert 0 < peak + kept < 300e6
