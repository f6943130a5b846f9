"""What people do with models, scanpy style: ``scfm.tl.<task>(adata, model)`` writes into the AnnData."""

from scfm.tasks.embed import embed
from scfm.tasks.state_embeddings import state_embeddings

__all__ = ["embed", "state_embeddings"]
