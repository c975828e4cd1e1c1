"""The engine: TLS 1.3 (RFC 9846) without I/O."""
