"""Where embeddings go: AnnData, .h5ad copies and .npy files, each with its provenance."""
