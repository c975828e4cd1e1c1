"""Runs one service under faults that a seed selects."""

import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from interop.faults.injections import Fault
from interop.faults.services import Service
from interop.faults.world import Broken, World

__all__ = ["run"]


def run(
    kind: type[Service],
    faults: Sequence[Fault],
    *,
    seed: int,
    rounds: int,
    seconds: float,
    tell: Callable[[str], object] = print,
) -> None:
    """Start a service, inject faults one after the other, and end it.

    Args:
        kind: the service.
        faults: all of them are injected, in an order that the seed chooses, again and again.
        seed: everything that is chosen depends on it alone; times on the machine, too.
        rounds: how many faults.
        seconds: how long each of them lasts.
        tell: is told what came through which fault.

    Raises:
        Broken: a check failed.
    """
    choice = random.Random(f"{seed} {kind.name}")
    order = choice.sample(list(faults), len(faults))
    with tempfile.TemporaryDirectory(prefix="faults-") as place:
        world = World(Path(place) / "world")
        try:
            service = kind(world)
            service.start()
            for index in range(rounds):
                fault = order[index % len(order)]
                name = fault.__name__
                began = time.monotonic()
                with fault(service, choice, seconds):
                    pass
                service.recover(name)
                service.check_descriptors()
                tell(f"{kind.name}: {name}: whole after {time.monotonic() - began:.1f} s")
            service.stop()
            world.check_nothing_left()
        except Broken as error:
            again = f"python -m interop.faults --command '{kind.name}' --seed {seed}"
            raise Broken(f"{kind.name}: {error}\nrepeat it: {again}") from None
        finally:
            world.close()
