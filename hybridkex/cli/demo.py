"""``hybridkex demo``: two sites, a QKD link, a file across, and what Eve has of it."""

import argparse
import math
from functools import partial
from pathlib import Path

from cryptography.hazmat.bindings import _rust

from hybridkex.cli.guarded import guarded_folder
from hybridkex.cli.manual import describe
from hybridkex.cli.running import end_as_interrupted, run_trio
from hybridkex.cli.values import folder_path
from hybridkex.demos.two_sites import Demonstration
from hybridkex.errors import ConfigError

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Two sites in one terminal: a simulated QKD link, a KME at each site, a handshake with "
        "X25519, ML-KEM and a QKD key, certificates on both sides, and a file across. Then every "
        "record that Eve recorded on the cable is searched for what was sent, and a report says "
        "what the keys rest on. Everything runs on this machine and takes about half a minute.",
        examples=["demo", "demo holiday.jpg --distance 80", "demo --keep recording"],
        status="0 when the file arrived whole and nothing of it is in Eve's recording, 1 otherwise",
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="the file to send; by default the largest library that hybridkex uses",
    )
    parser.add_argument(
        "--keep", type=folder_path, metavar="DIR", help="keep Eve's recording there, for Wireshark"
    )
    parser.add_argument(
        "--distance",
        type=float,
        default=25.0,
        metavar="KM",
        help="length of the QKD link's fibre (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; 0 when the file arrived whole and Eve has nothing of it."""
    source = Path(args.file or _rust.__file__).resolve()
    if not source.is_file():
        raise ConfigError(f"cannot read {source}: not a file that is there")
    if not 0 <= args.distance < math.inf:
        raise ConfigError("--distance is in km, and not negative")
    with end_as_interrupted(), guarded_folder("hybridkex-demo-") as folder:
        keep: Path = args.keep or folder
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write {keep}: {error.strerror}") from None
        demonstration = Demonstration(
            folder=folder,
            source=source,
            capture=keep / "eve.pcapng",
            distance=args.distance,
            say=partial(print, flush=True),
        )
        run_trio(demonstration.run)
    return 0
