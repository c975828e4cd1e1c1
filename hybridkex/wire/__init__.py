"""Bytes to messages and back: no crypto, no I/O, no state."""
