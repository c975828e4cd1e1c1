"""hybridkex against independent TLS implementations, over loopback.

A :class:`~interop.matrix.cases.Case` says what two ends must agree on and prove; a peer is a module
of ``peers/``; the runner puts hybridkex at one end and the peer at the other, each in each role,
and compares both reports of the connection. ``python -m interop`` runs all cases.
"""
