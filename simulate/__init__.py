"""Stage 3: rank policies and budgets offline from a capture."""
