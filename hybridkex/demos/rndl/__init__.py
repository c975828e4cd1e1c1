"""Record now, decrypt later: an adversary to test our channels against.

Three packages for three things that never meet in one process at one time::

    capture/   file formats that both know: pcapng, Ethernet, IP, TCP
    now/       the parties, the wire tap between them, the instruments that record private keys
    later/     the adversary of the future, alone with files, in a process of its own

``matrix.py`` says which configurations meet which adversaries, ``trial.py`` runs them against each
other, ``page.py`` and ``pictures.py`` show the outcome. ``later`` imports nothing of the rest but
``capture`` and the toy curve. What is modelled and what is real: docs/record-now-decrypt-later.md.
"""
