"""Erase memorized sequences from a checkpoint: choose what to remove, and write a folder without it.

``python -m memloc_lens.erase --model FOLDER --data FILE --out FOLDER``
"""

from memloc_lens.erase.checkpoint import write_checkpoint

__all__ = ["write_checkpoint"]
