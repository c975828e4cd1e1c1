"""The fixtures of this folder; what is imported by name is in ``apps_glue``."""

from apps_glue import keys, mutual, run, wire

__all__ = ["keys", "mutual", "run", "wire"]
