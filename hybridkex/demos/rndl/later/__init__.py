"""The future adversary: a separate process that has files and nothing else."""
