"""Calls what numba compiles for the link. Processes that follow find the code on disk."""

import numpy as np

from hybridkex.link.cascade import Cascade
from hybridkex.link.toeplitz import compress, seed_length


def main() -> None:
    ours, theirs = np.zeros(5000, dtype=np.uint8), np.zeros(5000, dtype=np.uint8)
    theirs[::50] = 1
    alice = Cascade().respond(ours, 0.02)
    search = Cascade(compiled=True).correct(theirs, 0.02)
    request = next(search)
    try:
        while True:
            request = search.send(alice.answer(request))
    except StopIteration:
        compress(ours, np.zeros(seed_length(len(ours)), dtype=np.uint8), 1000, compiled=True)


if __name__ == "__main__":
    main()
