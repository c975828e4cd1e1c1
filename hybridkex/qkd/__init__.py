"""QKD: where keys come from. Key sources, the ETSI GS QKD 014 interface, the simulated link."""
