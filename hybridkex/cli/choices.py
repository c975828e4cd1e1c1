"""The values that options take, as their help texts list them.

They are repeated here because a parser must print its help without importing the engine, the key
sources or the simulator; a test compares each list with the library.
"""

from typing import Final

GROUPS: Final = (
    "X25519MLKEM768",
    "SecP256r1MLKEM768",
    "SecP384r1MLKEM1024",
    "MLKEM768",
    "MLKEM1024",
    "x25519",
    "secp256r1",
    "secp384r1",
)
SHELLS: Final = ("bash", "zsh", "tcsh", "fish", "powershell")
SUITES: Final = (
    "TLS_AES_256_GCM_SHA384",
    "TLS_AES_128_GCM_SHA256",
    "TLS_CHACHA20_POLY1305_SHA256",
)
DEV_CA_ALGORITHMS: Final = (
    "ecdsa",
    "ecdsa-p384",
    "ecdsa-p521",
    "rsa",
    "rsa-pss",
    "ed25519",
    "mldsa44",
    "mldsa65",
    "mldsa87",
)
KME_ID_RULES: Final = ("cn", "san-uri", "dn", "serial")
"""The field of a KME's certificate that holds its ID; the first is the default."""
KME_TLS_KINDS: Final = ("stdlib", "hybridkex")
PRODUCERS: Final = ("random", "link")
REKEY_AFTER: Final = 120.0
"""Seconds; WireGuard's own interval."""
TRANSFER_PROTOCOL: Final = "hybridkex-transfer/2"
BIT_CHECKS: Final = ("on", "off")
DECOY_CHECKS: Final = ("full", "shares", "off")
FINITE_KEY: Final = ("tight", "published")
LEAKS: Final = ("alice", "both")
LINK_BOOTSTRAPS: Final = ("psk", "ecdsa", "ml-dsa")
LINK_PRESETS: Final = ("gys2005", "lim2014", "rusca2018", "boaron2018", "bbm92")
SCAN_SUFFIXES: Final = (".csv", ".parquet", ".json")
