"""Ranks of a run: how they meet and end, share a model, and agree on what a step does."""
