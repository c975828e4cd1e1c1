"""Thin wrappers around the primitives of `cryptography`. No TLS state lives here."""
