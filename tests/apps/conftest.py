"""The fixtures of this folder; what is imported by name is in ``apps_glue``."""

from apps_glue import forkserver, keys, kmes, mutual, run, wire

__all__ = ["forkserver", "keys", "kmes", "mutual", "run", "wire"]
