"""Stage 2: head kinds with honest confidence, and head importance, from a capture."""
