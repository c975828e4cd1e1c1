"""QKD keys: key sources, the key store, the ETSI GS QKD 014 client."""
