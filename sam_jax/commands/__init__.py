"""The commands of `sam-jax`: one file each, with the options next to the function."""
