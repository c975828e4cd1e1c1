"""Secure channels whose keys rest on ECDH, ML-KEM and QKD at once: TLS 1.3 on the wire."""

__version__ = "0.1.0"
