"""``hybridkex demo``: two sites, a QKD link, a file transfer, and what Eve learns."""

from functools import partial
from pathlib import Path
from typing import Final

import cryptography

from hybridkex.cli.demo import DemoOptions
from hybridkex.cli.guarded import check_room, explained, guarded_folder
from hybridkex.cli.running import end_as_interrupted, run_trio
from hybridkex.demos.two_sites import Demonstration
from hybridkex.errors import ConfigError
from hybridkex.machine import writing

_OTHER_PLACE: Final = "choose another one with --keep"


def run(options: DemoOptions) -> int:
    """Run it; 0 if the file arrived intact and Eve's recording reveals nothing of it."""
    source = Path(options.file or _largest_library()).resolve()
    if not source.is_file():
        raise ConfigError(f"cannot read {source}: there is no such file")
    with end_as_interrupted(), guarded_folder("hybridkex-demo-") as folder:
        keep: Path = options.keep or folder
        with writing(keep):
            keep.mkdir(parents=True, exist_ok=True)
        check_room(keep, _OTHER_PLACE)  # now, not when the KMEs have their keys
        demonstration = Demonstration(
            folder=folder,
            source=source,
            capture=keep / "eve.pcapng",
            distance=options.distance,
            print_line=partial(print, flush=True),
        )
        with explained(keep, _OTHER_PLACE):
            run_trio(demonstration.run)
    return 0


def _largest_library() -> Path:
    """The largest file of `cryptography`: a compiled library of some megabytes."""
    paths = Path(cryptography.__file__).parent.rglob("*")
    return max((path for path in paths if path.is_file()), key=lambda path: path.stat().st_size)
