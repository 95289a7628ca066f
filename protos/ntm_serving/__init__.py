"""The public API: one package for each version of it."""
