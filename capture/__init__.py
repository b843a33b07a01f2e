"""Stage 1: statistics and probes of a real model on real prompts, written to one HDF5 file."""
