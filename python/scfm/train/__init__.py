"""Training: objectives, corpus, loop, settings."""
