"""``python -m memloc_lens.benchmarks.del``: the DEL benchmark."""

from memloc_lens.benchmarks.deletion import main

if __name__ == "__main__":
    main()
