"""The speed of hybridkex beside its peers: ``python -m benchmarks --help``."""
