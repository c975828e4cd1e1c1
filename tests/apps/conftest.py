"""The fixtures of this folder; what is imported by name is in ``apps_glue``."""

from apps_glue import kmes, mutual, run, wire

__all__ = ["kmes", "mutual", "run", "wire"]
