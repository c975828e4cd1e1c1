"""Code shared by all shells around the engine: answers to its requests, and QKD keys as PSKs.

A shell moves bytes between the engine and an event loop; :mod:`hybridkex.streams` is the one for
trio. This package depends on no event loop.
"""
