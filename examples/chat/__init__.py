"""Chat over hybridkex: a server with rooms, a terminal client, and a mode for two without a server.

Run ``python -m examples.chat --help`` at the top of a checkout; docs/chat.md explains how it works.
All modules but ``__main__`` use only the public names of :mod:`hybridkex`.
"""
