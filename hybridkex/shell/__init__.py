"""What every shell around the engine shares: answers to its questions, and QKD keys as PSKs.

A shell moves bytes between the engine and an event loop: :mod:`hybridkex.streams` for trio. This
room knows no event loop.
"""
