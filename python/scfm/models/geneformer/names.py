"""The authors' tensor names and ours: one table, read in both directions.

The released files name tensors as Hugging Face's BertForMaskedLM does. Ours differ in one thing that matters,
query, key and value being one matrix, so that one product computes all three.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from scfm.models.geneformer.config import GeneformerConfig

_FIXED = {
    "bert.embeddings.word_embeddings.weight": "gene_table",
    "bert.embeddings.position_embeddings.weight": "position_table",
    "bert.embeddings.token_type_embeddings.weight": "type_table",
    "bert.embeddings.LayerNorm": "embedding_norm",
    "cls.predictions.bias": "head.bias",
    "cls.predictions.transform.dense": "head.transform",
    "cls.predictions.transform.LayerNorm": "head.norm",
}
_IN_LAYER = {
    "attention.output.dense": "attention_out",
    "attention.output.LayerNorm": "attention_norm",
    "intermediate.dense": "ffn_in",
    "output.dense": "ffn_out",
    "output.LayerNorm": "ffn_norm",
}
_FUSED = ("query", "key", "value")
HEAD_PREFIX = "cls.predictions."
TIED = {
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.decoder.bias": "cls.predictions.bias",
}
IGNORED = {
    "bert.embeddings.position_ids": "a buffer counting 0, 1, 2, ...: positions are computed",
    "bert.pooler.*": "the pooler feeds classification heads only",
    "classifier.*": "a classification head: not part of the encoder",
    "classification_heads.*": "a classification head: not part of the encoder",
    "attention_pool.*": "pooling of a classification head: not part of the encoder",
    "cls.predictions.decoder.*": "tied: equals the gene table and the head's bias",
}


def authors_shapes(config: GeneformerConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a released checkpoint of this shape must hold, tied ones left out."""
    hidden, ffn = config.hidden_size, config.ffn_size
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (config.vocab_size, hidden),
        "bert.embeddings.position_embeddings.weight": (config.max_tokens, hidden),
        "bert.embeddings.token_type_embeddings.weight": (config.type_vocab_size, hidden),
        "cls.predictions.bias": (config.vocab_size,),
    }
    modules = {
        "bert.embeddings.LayerNorm": (hidden,),
        "cls.predictions.transform.dense": (hidden, hidden),
        "cls.predictions.transform.LayerNorm": (hidden,),
    }
    for i in range(config.num_layers):
        layer = f"bert.encoder.layer.{i}."
        modules |= {f"{layer}attention.self.{part}": (hidden, hidden) for part in _FUSED}
        modules |= {
            f"{layer}attention.output.dense": (hidden, hidden),
            f"{layer}attention.output.LayerNorm": (hidden,),
            f"{layer}intermediate.dense": (ffn, hidden),
            f"{layer}output.dense": (hidden, ffn),
            f"{layer}output.LayerNorm": (hidden,),
        }
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def from_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' tensors under our names, query, key and value joined."""
    ours: dict[str, Tensor] = {}
    for name, tensor in state.items():
        fused = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.attention\.self\.query\.(weight|bias)", name)
        if fused:
            parts = [state[name.replace(".query.", f".{part}.")] for part in _FUSED]
            ours[f"layers.{fused[1]}.qkv.{fused[2]}"] = torch.cat(parts)
        elif ".attention.self." not in name:
            ours[_our_name(name)] = tensor
    return ours


def to_authors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors (weights or gradients) under the authors' names, query, key and value apart."""
    fixed = {ours: theirs for theirs, ours in _FIXED.items()}
    in_layer = {ours: theirs for theirs, ours in _IN_LAYER.items()}
    theirs: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(\w+)\.(weight|bias)", name)
        if layer is None:
            stem, _, kind = name.rpartition(".")
            theirs[fixed[name] if name in fixed else f"{fixed[stem]}.{kind}"] = tensor
        elif layer[2] == "qkv":
            for part, piece in zip(_FUSED, tensor.chunk(3), strict=True):
                theirs[f"bert.encoder.layer.{layer[1]}.attention.self.{part}.{layer[3]}"] = piece
        else:
            theirs[f"bert.encoder.layer.{layer[1]}.{in_layer[layer[2]]}.{layer[3]}"] = tensor
    return theirs


def _our_name(name: str) -> str:
    if name in _FIXED:
        return _FIXED[name]
    stem, _, kind = name.rpartition(".")
    if stem in _FIXED:
        return f"{_FIXED[stem]}.{kind}"
    index, rest = re.fullmatch(r"bert\.encoder\.layer\.(\d+)\.(.+)", stem).groups()  # type: ignore[union-attr]
    return f"layers.{index}.{_IN_LAYER[rest]}.{kind}"
