"""QKD: where keys come from. Key sources, the key store, the ETSI GS QKD 014 client."""
