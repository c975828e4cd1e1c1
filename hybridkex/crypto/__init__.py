"""Thin skins over the primitives of `cryptography`. No TLS state lives here."""
