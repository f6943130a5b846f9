"""Operators over packed cells, one file each: schema, float64-able reference, fast paths, autograd, fake."""

from scfm.ops.varlen_attention import varlen_attention, varlen_attention_reference

__all__ = ["varlen_attention", "varlen_attention_reference"]
