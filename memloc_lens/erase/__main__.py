"""Entry point of ``python -m memloc_lens.erase``."""

from memloc_lens.erase.command import main

if __name__ == "__main__":
    main()
