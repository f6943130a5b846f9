"""Operators over packed cells, one file each: schema, float64-able reference, fast paths, autograd, fake."""

from scfm.ops.embed_norm import embed_norm, embed_norm_reference
from scfm.ops.favor_attention import favor_attention, favor_attention_reference
from scfm.ops.gene_graph import GeneGraph, GraphPlan
from scfm.ops.generative_attention import generative_attention, generative_attention_reference
from scfm.ops.graph_attention import graph_attention, graph_attention_reference
from scfm.ops.masked_head_loss import masked_head_loss, masked_head_loss_reference
from scfm.ops.paths import explain, use_path
from scfm.ops.varlen_attention import varlen_attention, varlen_attention_reference

__all__ = [
    "GeneGraph",
    "GraphPlan",
    "embed_norm",
    "embed_norm_reference",
    "explain",
    "favor_attention",
    "favor_attention_reference",
    "generative_attention",
    "generative_attention_reference",
    "graph_attention",
    "graph_attention_reference",
    "masked_head_loss",
    "masked_head_loss_reference",
    "use_path",
    "varlen_attention",
    "varlen_attention_reference",
]
