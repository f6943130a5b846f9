"""Where embeddings go: folders of shards that survive anything, AnnData, .h5ad copies and .npy files."""

from scfm.embed.export import export_store
from scfm.embed.run import embed_to_folder
from scfm.embed.store import EmbeddingStore, open_store
from scfm.embed.verify import verify_store

__all__ = ["EmbeddingStore", "embed_to_folder", "export_store", "open_store", "verify_store"]
