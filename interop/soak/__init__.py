"""Soak and load tests: many connections, long runs, hostile peers; each is a command.

``python -m interop.soak idle|storm|slowloris|updates`` runs a server in a process of its own over
loopback TCP, loads it from here, and prints the resources that the server's process used, as one
JSON object.
"""
