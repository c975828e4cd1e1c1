"""Reasons that apply to several peers."""

from typing import Final

__all__ = ["IMPORT", "NO_HYBRIDS", "NO_MLDSA", "OVER_HTTP"]

IMPORT: Final = {
    "* imported PSK": "no RFC 9258 (the binder's label is `imp binder`); BoGo judges ours",
}
NO_HYBRIDS: Final = {
    "* retry from *MLKEM*": "no ML-KEM before OpenSSL 3.5",
    "* group *MLKEM*": "no ML-KEM before OpenSSL 3.5",
}
NO_MLDSA: Final = {"* certificate mldsa*": "no ML-DSA before OpenSSL 3.5"}
OVER_HTTP: Final = {
    "* half-close": "HTTP/1.1: a request, then its response",
    "* speaking after our close_notify": "HTTP/1.1: a request, then its response",
    "* large transfer": "HTTP/1.1: a request, then its response",
    "* KeyUpdate request": "no command for it",
    "client KeyUpdate answer": "HTTP/1.1: the client says nothing after the response",
    "* exporter": "not told over HTTP",
    "* plain PSK": "no option for it",
} | IMPORT
