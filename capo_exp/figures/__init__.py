"""Figures from logged runs: files -> table -> arrays -> axes. Nothing here imports torch."""
