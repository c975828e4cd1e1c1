"""ETSI GS QKD 014 V1.1.1 (2019-02): key delivery over REST, client and KME."""
