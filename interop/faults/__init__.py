"""Seeded fault injection: temporary failures of disks, files, signals, descriptors and peers.

``python -m interop.faults`` starts every long-running command over loopback in a folder of its
own, injects faults that it draws from a seed, takes each away again, and checks that the service
is then whole without anybody touching it: it answers, it holds no more descriptors than before, it
wrote no traceback and no flood of log lines, and when it ends it leaves no process, no private key
in a temporary folder and no half-written file. The exit status is 1 where a check failed; the line
that reports it ends with the command that repeats it.
"""
