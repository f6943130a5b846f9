"""The sets of real human cells in $SCFM_DATA that every family embeds."""

HUMAN_SETS = [
    "celllines_sc_mixology_5batches.h5ad",
    "citeseq_ctcl_500.h5ad",
    "pancreas_human_mouse_baron350.h5ad",
    "pbmc3k_labeled.h5ad",
    "pbmc_ifnb_stim_ctrl.h5ad",
    "pbmc_multichem.h5ad",
    "perturb_norman_mcfaline_500hvg.h5ad",
    "perturb_papalexi_thp1_299genes.h5ad",
    "spatial_her2st_4sections.h5ad",
    "spatial_pdac_428spots.h5ad",
]
