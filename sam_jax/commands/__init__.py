"""The commands of `sam-jax`: a file for each, its options beside its function."""
