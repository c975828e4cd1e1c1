"""A simulated QKD link that is a real protocol.

Only the light is simulated. What two modules of a decoy-state BB84 system do with their detections
is done here in full, by two parties that share nothing but a quantum and a classical channel.

::

    physics   presets   entropy        the channel, its parameters, closed forms
    asymptotic   finite_key            what a block is worth: Ma 2005, Lim 2014, Rusca 2018
    randomness   quantum   eavesdroppers   the light: sampled detections, and who touches it
    wire   authentication   ledger     the classical channel and the key that guards it
    parity   cascade   toeplitz        error correction and privacy amplification
    party   session   clock            the protocol itself
    producer   metrics                 what comes out, for the KMEs

The simulation is not a QKD module and claims no certification; see ``docs/qkd-link.md``.
"""
