"""Entry point of ``python -m memloc_lens.report``."""

from memloc_lens.report.command import main

if __name__ == "__main__":
    main()
