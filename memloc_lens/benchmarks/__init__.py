"""The benchmarks: loops over sequences, methods and ratios that write records."""
