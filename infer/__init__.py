"""Stage 4: the compressed cache for real - ragged storage, attention kernels, generation, measurement."""
