"""What people do with models, scanpy style: ``scfm.tl.<task>(adata, model)`` writes into the AnnData."""

from scfm.tasks.annotate import annotate
from scfm.tasks.attention import attention
from scfm.tasks.embed import embed
from scfm.tasks.generate import generate
from scfm.tasks.imputation_report import imputation_report
from scfm.tasks.impute import impute
from scfm.tasks.map_to_reference import map_to_reference
from scfm.tasks.mapping_report import mapping_report
from scfm.tasks.state_embeddings import state_embeddings

__all__ = [
    "annotate",
    "attention",
    "embed",
    "generate",
    "imputation_report",
    "impute",
    "map_to_reference",
    "mapping_report",
    "state_embeddings",
]
