"""Soak and load tests: many connections, long runs, hostile peers. Each is a command.

``python -m interop.soak idle|storm|slowloris|updates`` runs a server in a process of its own over
loopback TCP, loads it from here, and prints what the server's process needed, as one JSON object.
"""
