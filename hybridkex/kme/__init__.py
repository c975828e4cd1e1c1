"""The KME: a key management entity that serves ETSI GS QKD 014 from a key store."""
