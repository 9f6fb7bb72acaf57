"""Load sequences and texts from files and data sets on the hub."""

from memloc_lens.data.definitions import load_definitions
from memloc_lens.data.files import load_sequences, load_texts

__all__ = ["load_definitions", "load_sequences", "load_texts"]
