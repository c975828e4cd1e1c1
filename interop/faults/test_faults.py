"""A short run: some faults against each command, from one seed.

``python -m interop.faults`` runs all of them.
"""

import os
from pathlib import Path

import pytest

from interop.faults import injections as inject
from interop.faults import services
from interop.faults.run import run
from interop.immutable import can_be_immutable, immutable

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
    run(kind, faults, seed=14, rounds=len(faults), seconds=0.2)


def test_files_are_read_only_for_root_too(tmp_path: Path) -> None:
    """Where this is skipped, ``read_only`` does nothing in the runs above."""
    if not can_be_immutable(tmp_path):
        pytest.skip("read-only files take root with CAP_LINUX_IMMUTABLE, and ext4, XFS or Btrfs")
    file = tmp_path / "file"
    file.touch()
    with file.open("w") as opened, immutable([tmp_path, file]):
        for change in (lambda: os.write(opened.fileno(), b"x"), file.unlink):
            with pytest.raises(PermissionError):
                change()
    file.unlink()
