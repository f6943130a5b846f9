"""Blocks that model families share: precision, linear layers, the packed encoder."""
