"""Applications over the channel: file transfer and tunnel.

They are the proof that the public names of :mod:`hybridkex` are enough: nothing here reaches
further in. The commands in :mod:`hybridkex.cli` add options and output.
"""
