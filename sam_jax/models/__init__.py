"""The model: Flax NNX modules, arrays in and arrays out."""
