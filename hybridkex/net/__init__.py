"""Shared by everything networked: addresses, HTTP, supervision of accepted connections."""
