"""The engine: TLS 1.3 (RFC 8446, revised as RFC 9846) without I/O."""
