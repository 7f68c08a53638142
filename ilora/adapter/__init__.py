"""What is adapted: configuration, targets, the record of an adapter, merging."""
