"""The asyncio shell compared with asyncio's own TLS and with plain TCP.

``python -m interop.shells --seeds 2000`` runs random programs; see :mod:`interop.shells.programs`.
"""
