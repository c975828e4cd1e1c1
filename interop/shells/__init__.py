"""The asyncio shell beside asyncio's own TLS and beside plain TCP.

``python -m interop.shells --seeds 2000`` runs random programs; see :mod:`interop.shells.programs`.
"""
