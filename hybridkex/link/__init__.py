"""A simulated QKD link that is a real protocol.

Only the light is simulated. What two modules of a decoy-state BB84 system do with their detections
is done here in full, by two parties that share nothing but a quantum and a classical channel.

::

    entropy   physics   presets        the channel, its parameters, closed forms
    asymptotic   finite_key            what a block is worth: Ma 2005, Lim 2014, Rusca 2018
    optimise   plots                   the best intensities for a distance; pictures
    randomness   quantum   pulses   eavesdroppers    the light, sampled or pulse by pulse; Eve
    wire   line   authentication   ledger            the classical channel and what guards it
    interference                       Eve on the classical channel
    cascade   toeplitz                 error correction and privacy amplification
    settings   party                   the protocol itself
    simulated   remote                 both parties in one process or two

The simulation is not a QKD module and claims no certification; see ``docs/qkd-link.md``.
"""
