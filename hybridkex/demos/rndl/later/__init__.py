"""The adversary of the future: a process of its own that has files and nothing else."""
