"""A simulated QKD link that is a real protocol.

Only the light is simulated. Everything that two modules of a decoy-state BB84 system do with their
detections is done here in full, by two parties that share only a quantum and a classical channel.

::

    physics   presets   satellite                the channel, its parameters, closed forms
    statistics   asymptotic   finite_key         confidence bounds; what a block is worth
    optimise   scan   plots                      the best settings for a distance; scans; pictures
    randomness   quantum   pulses                the light, sampled or pulse by pulse
    eavesdroppers   interference                 Eve on the light, and on the classical channel
    wire   classical   authentication   ledger   the classical channel and its protection
    reconciliation   cascade                     error correction: the interface, and Cascade
    cascade_arrays   cascade_loops               its inner loops in numpy, and for numba
    toeplitz   toeplitz_loops   compiled         privacy amplification; what numba compiles
    settings   party                             the protocol itself
    simulated   remote   measured                both parties here or in two processes; files

The simulation is not a QKD module and claims no certification; see ``docs/qkd-link-model.md``.
"""

from hybridkex.extras import needs

with needs("link"):
    import numpy as np  # noqa: F401  # nearly every module here needs it
