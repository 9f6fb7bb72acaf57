"""``python -m memloc_lens.benchmarks.inj``: the INJ benchmark."""

from memloc_lens.benchmarks.injection import main

if __name__ == "__main__":
    main()
