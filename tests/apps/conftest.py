"""The fixtures of this folder; what is imported by name is in ``apps_glue``."""

from apps_glue import configs, kmes, mutual, run, wire

__all__ = ["configs", "kmes", "mutual", "run", "wire"]
