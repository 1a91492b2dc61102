"""Each bar of the product, measured beside a baseline in the same run: ``python -m benchmarks [NAME ...]``."""
