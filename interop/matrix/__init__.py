"""hybridkex against TLS implementations that nobody here wrote, over loopback.

A :class:`~interop.matrix.cases.Case` says what two ends must agree on and prove; a peer is a module
of ``peers/``; the runner puts hybridkex at one end and the peer at the other, each in each role,
and judges what both say of the connection. ``python -m interop`` runs it all.
"""
