"""What a run has learned: held-out cells beside baselines, and probes of the embedding beside PCA."""
