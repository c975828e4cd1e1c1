"""Chat over the channel: a server with rooms, a terminal client, a mode for two without a server.

``python -m examples.chat --help`` from the top of a checkout; docs/chat.md tells how it works. The
modules beside ``__main__`` use the public names of :mod:`hybridkex` alone.
"""
