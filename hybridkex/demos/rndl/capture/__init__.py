"""The format of recordings: written by a wire tap, read by an adversary."""
