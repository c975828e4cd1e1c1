"""Chat over the channel: a server with rooms, a terminal client, a mode for two without a server.

``python -m examples.chat --help`` from the top of a checkout; docs/chat.md explains how it works.
All modules but ``__main__`` use only the public names of :mod:`hybridkex`.
"""
