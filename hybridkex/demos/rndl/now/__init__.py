"""The processes during the sessions: the parties, the wire taps, the instruments."""
