"""Erase memorized sequences from a model, and audit what is left of them."""
