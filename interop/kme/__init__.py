"""Two sites of KMEs under faults, and a check of the results that their SAEs got.

``python -m interop.kme`` runs two sites, each with several ``kme serve`` processes on a PostgreSQL
database of its own, or with one process on SQLite. SAEs of both draw and collect keys as fast as
they can, while faults that a seed chooses are injected: processes are killed or stopped, the
databases are killed or fall silent, the network between the sites is cut, clocks jump by a day,
files cannot grow. Every call and its answer are written to a history.

:mod:`interop.kme.history` checks the history. It knows only the calls of ETSI GS QKD 014, and
nothing of the KMEs' processes, their stores or the faults.
"""
