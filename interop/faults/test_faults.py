"""A short run: some faults against four commands, from one seed.

``python -m interop.faults`` runs all of them.
"""

import pytest

from interop.faults import injections as inject
from interop.faults.run import run
from interop.faults.services import Kme, Listen, Service, Tunnel, WgPsk

SHORT: dict[type[Service], tuple[inject.Fault, ...]] = {
    Listen: (inject.disk_full, inject.no_descriptors, inject.no_threads, inject.no_memory),
    Tunnel: (inject.bad_reloads, inject.files_removed, inject.stopped, inject.no_descriptors),
    Kme: (inject.disk_full, inject.signals, inject.peers_stop),
    WgPsk: (inject.stopped,),
}


@pytest.mark.parametrize("kind", SHORT, ids=lambda kind: kind.name)
def test_whole_after_faults(kind: type[Service]) -> None:
    faults = SHORT[kind]
    run(kind, faults, seed=14, rounds=len(faults), seconds=0.2)
