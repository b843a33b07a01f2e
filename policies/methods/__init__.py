"""One file per method; each class here is found by its ``name`` without being listed anywhere."""
