"""Tokenizers, one a family, thin over the native module."""
