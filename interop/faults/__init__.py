"""Seeded fault injection: temporary failures of disks, files, signals, descriptors and peers.

``python -m interop.faults`` starts every long-running command over loopback in a folder of its
own, injects faults that a seed selects, removes each fault again, and checks that the service then
recovers by itself: it answers, it holds no more descriptors than before, it wrote no traceback and
no flood of log lines, and at its end it leaves no process, no private key in a temporary folder and
no partly written file. The exit status is 1 if a check failed; the line that reports the failure
ends with the command that repeats it.
"""
