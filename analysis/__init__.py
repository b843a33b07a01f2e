"""Stage 5: prediction beside reality - intervals, tables, figures, fidelity, report.html. Reads files only."""
