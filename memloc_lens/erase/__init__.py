"""Erase memorized sequences from a checkpoint: choose what to remove, and write a folder without it.

``python -m memloc_lens.erase --model FOLDER --data FILE --out FOLDER``
"""

from memloc_lens.erase.checkpoint import write_checkpoint
from memloc_lens.erase.choosing import Erasure, choose
from memloc_lens.erase.damage import Budget, Spared, Utility
from memloc_lens.erase.erasing import erase_sequences

__all__ = ["Budget", "Erasure", "Spared", "Utility", "choose", "erase_sequences", "write_checkpoint"]
