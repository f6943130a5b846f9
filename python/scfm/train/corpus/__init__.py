"""The cells of a run: vocabulary, lengths, the plan of microbatches, and the feed that reads them ahead."""
