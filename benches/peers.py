"""What the peers do, so that a bench can time it beside ours in the same run: a library that can be installed is called
as its documentation says, a published procedure is rewritten step by step in our own words. One section a subject;
where a peer offers several ways, the one that was fastest for it is taken.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch

from scfm.models.geneformer.names import to_authors

Array = np.ndarray[Any, np.dtype[Any]]

# ---- Geneformer's tokenizer -------------------------------------------------------------------------------------
# As released (V2): chunks of 512 cells, scipy for the values, numpy's argsort for each cell, then a Hugging Face
# data set that is built from Python lists and mapped example by example.

GENEFORMER_CHUNK = 512
GENEFORMER_MAX_TOKENS = 4096
GENEFORMER_CLS, GENEFORMER_EOS = 2, 3


def geneformer_rank(cells: sp.csr_matrix, n_counts: Array, tokens: Array, medians: Array) -> list[Array]:
    """The ranking stage: raw counts to one array of ordered tokens a cell, before cutting and special tokens."""
    ranked: list[Array] = []
    for start in range(0, cells.shape[0], GENEFORMER_CHUNK):
        chunk = slice(start, start + GENEFORMER_CHUNK)
        values = cells[chunk].multiply(1.0 / n_counts[chunk, None])
        values = sp.csr_matrix((values * 10_000).multiply(1.0 / medians))
        for i in range(values.shape[0]):
            row = values[i]
            ranked.append(tokens[row.indices][np.argsort(-row.data)])
    return ranked


def _geneformer_finish(example: dict[str, Any]) -> dict[str, Any]:
    ids = example["input_ids"][: GENEFORMER_MAX_TOKENS - 2]
    ids = np.insert(ids, 0, GENEFORMER_CLS)
    example["input_ids"] = np.insert(ids, len(ids), GENEFORMER_EOS)
    example["length"] = len(example["input_ids"])
    return example


def geneformer_tokenize_to_disk(
    cells: sp.csr_matrix, n_counts: Array, tokens: Array, medians: Array, folder: Path
) -> None:
    """The whole run from counts in memory to a saved data set. Needs `datasets`."""
    from datasets import Dataset

    ranked = geneformer_rank(cells, n_counts, tokens, medians)
    dataset = Dataset.from_dict({"input_ids": ranked})
    dataset.map(_geneformer_finish).save_to_disk(str(folder))


# ---- Embedding: Hugging Face's BERT, driven as the original's extractor drives it ----------------------------


def hugging_face_model(transformers: Any, config: Any, model: Any) -> Any:
    """BertForMaskedLM of the same shape and the same weights as ``model``."""
    settings = transformers.BertConfig(**{k: v for k, v in config.to_hf().items() if k != "architectures"})
    peer = transformers.BertForMaskedLM._from_config(settings, attn_implementation="sdpa").eval()
    state = {name: tensor.detach() for name, tensor in to_authors(model.state_dict()).items()}
    left_out = peer.load_state_dict(state, strict=False)
    assert not left_out.unexpected_keys, left_out
    assert all("decoder" in key or "position_ids" in key for key in left_out.missing_keys), left_out
    return peer


def hugging_face_embed(peer: Any, cells: list[list[int]], *, batch_size: int) -> np.ndarray:
    """The <cls> state of the second to last layer, rows in the order given: everything else is discarded."""
    order = sorted(range(len(cells)), key=lambda i: -len(cells[i]))
    out = np.empty((len(cells), peer.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = len(cells[chosen[0]])
        padded = torch.tensor([cells[i] + [0] * (longest - len(cells[i])) for i in chosen])
        mask = torch.tensor([[1] * len(cells[i]) + [0] * (longest - len(cells[i])) for i in chosen])
        with torch.no_grad():
            result = peer(input_ids=padded, attention_mask=mask, output_hidden_states=True)
        out[chosen] = result.hidden_states[-2][:, 0].float().numpy()
    return out


# ---- scGPT's embedding: the original's modules rebuilt from torch.nn ----------------------------------------------
# Gene and value encoders and nn.TransformerEncoder, run without gradients: torch's nested-tensor fast path, which is
# what the original's embed_data takes on a CPU. Every token of every layer is computed, the first is kept.


class ScgptEncoder(torch.nn.Module):
    """As released, from gene ids and values (B, L) to unit rows (B, hidden_size)."""

    def __init__(self, config: Any, pad_id: int) -> None:
        super().__init__()
        size = config.hidden_size
        self.pad_id = pad_id
        self.genes = torch.nn.Embedding(config.vocab_size, size, padding_idx=pad_id)
        self.gene_norm = torch.nn.LayerNorm(size)
        self.value_in, self.value_out = torch.nn.Linear(1, size), torch.nn.Linear(size, size)
        self.value_norm = torch.nn.LayerNorm(size)
        layer = torch.nn.TransformerEncoderLayer(
            size, config.num_heads, config.ffn_size, config.dropout, batch_first=True
        )
        self.layers = torch.nn.TransformerEncoder(layer, config.num_layers)

    @classmethod
    def of(cls, model: Any, pad_id: int) -> ScgptEncoder:
        """With the weights of ``model``."""
        from scfm.models.scgpt.names import their_name

        ours = {their_name(name): tensor.detach() for name, tensor in model.state_dict().items()}
        parts = {
            "genes": "encoder.embedding",
            "gene_norm": "encoder.enc_norm",
            "value_in": "value_encoder.linear1",
            "value_out": "value_encoder.linear2",
            "value_norm": "value_encoder.norm",
            "layers": "transformer_encoder",
        }
        peer = cls(model.config, pad_id).eval()
        state = {
            f"{here}{name.removeprefix(there)}": tensor
            for here, there in parts.items()
            for name, tensor in ours.items()
            if name.startswith(f"{there}.")
        }
        peer.load_state_dict(state)
        return peer

    def forward(self, genes: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        padding = genes.eq(self.pad_id)
        inner = torch.relu(self.value_in(values.clamp(max=512).unsqueeze(-1)))
        x = self.gene_norm(self.genes(genes)) + self.value_norm(self.value_out(inner))
        cells = self.layers(x, src_key_padding_mask=padding)[:, 0].float()
        return cells / cells.norm(dim=1, keepdim=True)


def scgpt_embed(peer: ScgptEncoder, genes: torch.Tensor, values: torch.Tensor, *, batch_size: int) -> Array:
    """float32 (cells, hidden_size), batch by batch."""
    dtype = peer.value_in.weight.dtype
    with torch.no_grad():
        parts = [
            peer(ids, numbers.to(dtype))
            for ids, numbers in zip(genes.split(batch_size), values.split(batch_size), strict=True)
        ]
    return torch.cat(parts).numpy()


# ---- Reading counts from an .h5ad file ---------------------------------------------------------------------------
# Each gives CSR matrices batch by batch, of a file that is open already: ``backed`` is what
# anndata.read_h5ad(path, backed="r") returns, ``group`` the h5py group of its X.


def h5py_slices(group: Any, *, num_rows: int = 4096) -> Iterator[sp.csr_matrix]:
    """Rows in order: plain h5py slices of the three arrays, which scipy takes as they are."""
    indptr, num_genes = group["indptr"][:], int(group.attrs["shape"][1])
    for first in range(0, len(indptr) - 1, num_rows):
        pointers = indptr[first : first + num_rows + 1]
        span = slice(pointers[0], pointers[-1])
        parts = group["data"][span], group["indices"][span], pointers - pointers[0]
        yield sp.csr_matrix(parts, shape=(len(pointers) - 1, num_genes))


def anndata_slices(backed: Any, *, num_rows: int = 4096) -> Iterator[sp.csr_matrix]:
    for first in range(0, backed.n_obs, num_rows):
        yield backed.X[first : first + num_rows]


def anndata_random(backed: Any, *, batch_size: int = 256, seed: int = 0) -> Iterator[sp.csr_matrix]:
    """Fully random batches, each batch's rows sorted, which is what anndata reads fastest."""
    order = np.random.default_rng(seed).permutation(backed.n_obs)
    for start in range(0, len(order), batch_size):
        yield backed.X[np.sort(order[start : start + batch_size])]


def ann_loader(backed: Any, *, batch_size: int = 256) -> Iterator[sp.csr_matrix]:
    """anndata's own torch loader, shuffled. Without its converter, which would make dense tensors of the rows."""
    from anndata.experimental import AnnLoader

    for batch in AnnLoader(backed, batch_size=batch_size, shuffle=True, use_default_converter=False):
        yield batch.X


def sc_dataset(
    backed: Any, *, block_size: int | None = 64, num_workers: int = 0, seed: int = 0
) -> Iterator[sp.csr_matrix]:
    """scDataset with batches of 256 and its default fetch factor 16; block_size None: its Streaming strategy.

    The fetch callback takes X alone and leaves it sparse: faster for it than materialising an AnnData or a dense
    array, as its documented transforms do.
    """
    from scdataset import BlockShuffling, Streaming, scDataset
    from torch.utils.data import DataLoader

    strategy = Streaming() if block_size is None else BlockShuffling(block_size=block_size)
    dataset = scDataset(
        backed,
        strategy,
        batch_size=256,
        fetch_factor=16,
        fetch_callback=lambda collection, rows: collection.X[rows],
        seed=seed,
    )
    yield from DataLoader(dataset, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is)


def _as_it_is(batch: Any) -> Any:
    return batch


# ---- scGPT's data set and collator -------------------------------------------------------------------------------
# As embed_data runs them: the whole matrix made dense, each row's non-zero values behind <cls>, then a batch's cells
# binned one by one (quantiles, two searches, a random number a value), sampled to length with torch and padded. The
# original spreads this over the workers of a DataLoader; here it runs in this process, so rates are those of one.

SCGPT_MAX_TOKENS, SCGPT_NUM_BINS, SCGPT_BATCH = 1200, 51, 64
SCGPT_PAD_VALUE = -2.0


def scgpt_example(row: Array, gene_ids: Array, cls_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One row of the dense matrix: ids and values of its expressed genes, <cls> first."""
    (expressed,) = np.nonzero(row)
    values = np.insert(row[expressed], 0, SCGPT_PAD_VALUE)
    genes = np.insert(gene_ids[expressed], 0, cls_id)
    return torch.from_numpy(genes).long(), torch.from_numpy(values).float()


def scgpt_bins(values: Array) -> Array:
    """Quantile bins; where several edges equal a value, one of the bins between them at random."""
    edges = np.quantile(values, np.linspace(0, 1, SCGPT_NUM_BINS - 1))
    left = np.digitize(values, edges)
    right = np.digitize(values, edges, right=True)
    # The original's generator, so the legacy one.
    return np.ceil(np.random.rand(len(values)) * (right - left) + left)  # noqa: NPY002


def scgpt_batches(
    matrix: Any, gene_ids: Array, cls_id: int, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Padded batches of gene ids and bins, each (cells, tokens)."""
    dense = matrix.toarray() if sp.issparse(matrix) else matrix
    for start in range(0, len(dense), SCGPT_BATCH):
        rows = dense[start : start + SCGPT_BATCH]
        examples = [scgpt_example(row, gene_ids, cls_id) for row in rows]
        longest = min(SCGPT_MAX_TOKENS, max(len(genes) for genes, _ in examples))
        padded = []
        for genes, values in examples:
            values[1:] = torch.from_numpy(scgpt_bins(values[1:].numpy()))
            if len(genes) > longest:
                kept = torch.randperm(len(genes) - 1)[: longest - 1] + 1
                kept = torch.cat([torch.zeros(1, dtype=torch.int64), kept])
                genes, values = genes[kept], values[kept]
            missing = longest - len(genes)
            genes = torch.cat([genes, torch.full((missing,), pad_id)])
            values = torch.cat([values, torch.full((missing,), SCGPT_PAD_VALUE)])
            padded.append((genes, values))
        yield torch.stack([genes for genes, _ in padded]), torch.stack([values for _, values in padded])
