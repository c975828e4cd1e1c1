"""A short run: some faults against each command, from one seed.

``python -m interop.faults`` runs all of them.
"""

from pathlib import Path

import pytest

from interop.faults import injections as inject
from interop.faults import services
from interop.faults.run import run
from interop.immutable import can_be_immutable

SHORT: dict[type[services.Service], tuple[inject.Fault, ...]] = {
    services.Listen: (inject.disk_full, inject.no_descriptors, inject.no_threads, inject.no_memory),
    services.Receive: (inject.read_only, inject.clock),
    services.Tunnel: (
        inject.bad_reloads,
        inject.files_removed,
        inject.stopped,
        inject.no_descriptors,
    ),
    services.TunnelListen: (inject.clock, inject.peers_stop),
    services.Kme: (inject.disk_full, inject.signals, inject.peers_stop, inject.read_only),
    services.KmeLink: (inject.clock, inject.read_only),
    services.WgPsk: (inject.stopped, inject.clock),
    services.Chat: (inject.read_only, inject.clock),
}


def test_every_service_is_in_it() -> None:
    assert set(SHORT) == set(services.SERVICES)


@pytest.mark.parametrize("kind", SHORT, ids=lambda kind: kind.name)
def test_whole_after_faults(kind: type[services.Service], tmp_path: Path) -> None:
    faults = SHORT[kind]
    cannot = inject.read_only in faults and not can_be_immutable(tmp_path)
    if cannot:
        faults = tuple(one for one in faults if one is not inject.read_only)
    run(kind, faults, seed=14, rounds=len(faults), seconds=0.2)
    if cannot:
        pytest.skip("all but read-only files, which take root with CAP_LINUX_IMMUTABLE and ext4")
