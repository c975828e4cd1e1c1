"""``hybridkex demo``: two sites, a QKD link, a real file across, and what Eve has of it.

Everything is what a user would run: the KMEs are ``kme serve``, the two parties ``listen`` and
``connect``, each a process of its own. Eve is a tap on the cable between them.
"""

import argparse
import hashlib
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import trio
from cryptography.hazmat.bindings import _rust
from prometheus_client.parser import text_string_to_metric_families

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli.manual import describe
from hybridkex.cli.running import run_trio
from hybridkex.cli.values import folder_path
from hybridkex.crypto.kex import ALL_GROUPS
from hybridkex.demos.rndl.later.reading import Connection, read_capture
from hybridkex.demos.rndl.now.tap import wire_tap
from hybridkex.errors import ConfigError, HybridkexError
from hybridkex.files import open_private
from hybridkex.qkd.psk import name_of
from hybridkex.wire.extensions import PreSharedKeyOffer, ServerName
from hybridkex.wire.messages import ImportedIdentity

__all__ = ["configure", "run"]

_TIMEOUT: Final = 60.0
_COMMAND: Final = (sys.executable, "-m", "hybridkex")
_SITES: Final = ("alice", "bob")
_SAMPLES: Final = 64
"""Pieces of the file that are looked for in Eve's recording."""


class DemoFailed(HybridkexError):
    """A step of the demonstration did not work."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    describe(
        parser,
        "Two sites in one terminal: a simulated QKD link, a KME at each site, a handshake with "
        "X25519, ML-KEM and a QKD key, certificates on both sides, a real file across; then what "
        "Eve, who recorded the cable, has of it, and a report of what the keys rest on. Everything "
        "runs on this machine and takes about half a minute.",
        examples=["demo", "demo holiday.jpg --distance 80", "demo --keep recording"],
    )
    parser.add_argument(
        "file",
        nargs="?",
        metavar="FILE",
        help="what to send; by default the largest library that hybridkex uses",
    )
    parser.add_argument(
        "--keep", type=folder_path, metavar="DIR", help="leave Eve's recording there, for Wireshark"
    )
    parser.add_argument(
        "--distance",
        type=float,
        default=25.0,
        metavar="KM",
        help="of the QKD link's fibre (default: %(default)g)",
    )


def run(args: argparse.Namespace) -> int:
    """Run it; 0 when the file arrived whole and Eve has nothing of it."""
    source = Path(args.file or _rust.__file__).resolve()
    if not source.is_file():
        raise ConfigError(f"cannot read {source}: not a file that is there")
    if not 0 <= args.distance < math.inf:
        raise ConfigError("--distance is in km, and not negative")
    with tempfile.TemporaryDirectory(prefix="hybridkex-demo-") as name:
        folder = Path(name)
        keep: Path = args.keep or folder
        try:
            keep.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"cannot write {keep}: {error.strerror}") from None
        run_trio(partial(_demonstrate, folder, source, keep / "eve.pcapng", args.distance))
    return 0


async def _demonstrate(folder: Path, source: Path, capture: Path, distance: float) -> None:
    target = folder / "received"
    _heading("1. Two sites and the QKD link between them")
    async with _kmes(folder / "sites", distance) as urls:
        _heading("2. Alice sends Bob a file")
        _make_certificates(folder)
        seconds, session = await _transfer(folder, urls, source, target, capture)
    _report_file(source, target, seconds)

    _heading("3. What Eve recorded on the way")
    _report_recording(capture, source)

    _heading("4. What the keys rest on")
    _report_session(session)


def _heading(text: str) -> None:
    print(f"\n{text}", flush=True)


def _say(text: str) -> None:
    print(f"   {text}", flush=True)


# --- the sites ------------------------------------------------------------------------------------


@asynccontextmanager
async def _kmes(folder: Path, distance: float) -> AsyncIterator[dict[str, str]]:
    """Run both KMEs, fed by a QKD link, until they have keys; gives the URL of each SAE's."""
    command = [*_COMMAND, "kme", "dev-up", str(folder), "--ports", "0,0", "--tls", "hybridkex"]
    command += ["--producer", "link", "--distance", str(distance), "--metrics", "127.0.0.1:0"]
    async with _process(command) as process:
        lines = _lines(process)
        with _deadline("the KMEs did not start"):
            urls = [(await anext(lines)).split()[-1] for _ in range(2)]
            metrics = (await anext(lines)).split()[-1]
        with _deadline(f"the QKD link over {distance:g} km made no keys"):
            link = await _first_keys(metrics)
        _say(
            f"decoy-state BB84 over {distance:g} km of simulated fibre, post-processed by the book:"
        )
        _say(
            f"{link['sifted_bits_total']:,.0f} sifted bits, QBER {link['qber_ratio']:.2%}, "
            f"{link['secret_bits_total']:,.0f} secret bits"
        )
        _say("at each end a KME; every program fetches its keys from the one beside it")
        _say("(ETSI GS QKD 014, over post-quantum TLS)")
        yield dict(zip(_SITES, urls, strict=True))


async def _first_keys(metrics: str) -> dict[str, float]:
    """What the link says of itself, once both KMEs have keys of it."""
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            found: dict[str, float] = {}
            stocks = []
            for family in text_string_to_metric_families((await client.get(metrics)).text):
                for sample in family.samples:
                    if sample.name == "hybridkex_kme_keys_stored":
                        stocks.append(sample.value)
                    elif sample.labels.get("kme") == "kme-a":
                        found[sample.name.removeprefix("hybridkex_qkd_link_")] = sample.value
            if len(stocks) == len(_SITES) and all(stocks):
                return found
            await trio.sleep(0.1)


def _make_certificates(folder: Path) -> None:
    authority = DevCa.create()
    write_identity(folder / "bob", authority, authority.issue("localhost", "127.0.0.1"))
    write_identity(folder / "alice", authority, authority.issue("alice"))
    _say("each has a certificate of a development authority")


def _options(folder: Path, who: str, peer: str, url: str) -> list[str]:
    """What a party adds to ``listen`` or ``connect``."""
    words = ["--kme", url, "--kme-tls", "hybridkex", "--sae", who, "--peer-sae", peer]
    for option in ("ca", "cert", "key"):
        words += [f"--{option}", str(folder / who / f"{option}.pem")]
        words += [f"--kme-{option}", str(folder / "sites" / who / f"{option}.pem")]
    return words


async def _transfer(
    folder: Path, urls: dict[str, str], source: Path, target: Path, capture: Path
) -> tuple[float, dict[str, Any]]:
    """Run ``listen`` and ``connect``, with Eve's tap between them."""
    port_file = folder / "port"
    listen = [*_COMMAND, "listen", "0", "--bind", "127.0.0.1", "--once"]
    listen += ["--port-file", str(port_file), "--require-client-cert"]
    began = time.monotonic()
    with open_private(target) as sink, source.open("rb") as file:
        async with _process(
            [*listen, *_options(folder, "bob", "alice", urls["bob"])], stdout=sink.fileno()
        ) as receiver:
            with _deadline("the listener did not open its port"):
                port = int(await _contents(trio.Path(port_file), receiver))
            with _deadline("the transfer did not end"):
                async with wire_tap(capture, ("127.0.0.1", port)) as (_, tapped):
                    command = [*_COMMAND, "connect", "localhost", str(tapped), "--json"]
                    sender = await trio.run_process(
                        [*command, *_options(folder, "alice", "bob", urls["alice"])],
                        stdin=file,
                        stdout=subprocess.DEVNULL,
                        capture_stderr=True,
                        check=False,
                    )
                    complaint = await _rest(receiver)
                    status = await receiver.wait()
    if sender.returncode or status:
        raise DemoFailed(_complaint(sender.stderr + complaint))
    return time.monotonic() - began, json.loads(sender.stderr.splitlines()[0])


# --- the reports ----------------------------------------------------------------------------------


def _report_file(source: Path, target: Path, seconds: float) -> None:
    if _digest(source) != _digest(target):
        raise DemoFailed("the file that arrived is not the file that was sent")
    size = f"{source.stat().st_size:,} bytes"
    _say(f"{source.name}, {size}, in {seconds:.2f} s (start of both programs included)")
    _say(f"SHA-256 at both ends: {_digest(target)}")


@dataclass(frozen=True)
class _Overheard:
    """What a handshake says in the clear."""

    connection: Connection

    @property
    def server_name(self) -> str:
        name = self.connection.client_hello.extensions.get(ServerName)
        return name.host_name if name is not None else "none"

    @property
    def group(self) -> str:
        names = {group.code: group.name for group in ALL_GROUPS}
        return names[self.connection.group]

    @property
    def key_ids(self) -> list[str]:
        offer = self.connection.client_hello.extensions.get(PreSharedKeyOffer)
        found: dict[str, None] = {}
        for one in offer.identities if offer is not None else ():
            imported = ImportedIdentity.decode(one.identity)
            name = name_of(imported.external_identity) if imported is not None else None
            found |= dict.fromkeys(str(part.key_id) for part in name or ())
        return list(found)


def _report_recording(capture: Path, source: Path) -> None:
    connections, _ = read_capture(capture)
    if len(connections) != 1:
        raise DemoFailed(f"Eve recorded {len(connections)} handshakes where there was one")
    overheard = _Overheard(connections[0])
    records = connections[0].records
    _say(f"{len(records):,} records, {sum(record.size for record in records):,} bytes")
    _say(f"in the clear: server name {overheard.server_name}, group {overheard.group},")
    _say(f"  the public shares, and the ID (not the key) {', '.join(overheard.key_ids)}")
    recorded = capture.read_bytes()
    pieces = _pieces(source)
    seen = sum(piece in recorded for piece in pieces)
    if seen:
        raise DemoFailed(f"{seen} of {len(pieces)} pieces of the file are in Eve's recording")
    _say(f"of {len(pieces)} pieces of the file that were looked for in it, none is there")
    _say("to read it later she must get past ALL of the legs below;")
    _say("'hybridkex rndl' plays that through, with an adversary who breaks them")


def _pieces(source: Path) -> list[bytes]:
    """Pieces of 32 bytes from all over the file, those that could be there by chance left out."""
    size = source.stat().st_size
    found = []
    with source.open("rb") as file:
        for index in range(_SAMPLES):
            file.seek(size * index // _SAMPLES)
            piece = file.read(32)
            if len(set(piece)) > 8:
                found.append(piece)
    return found


def _report_session(session: dict[str, Any]) -> None:
    for part in session["parts"]:
        _say(f"- {part}")
    for key_id, source in zip(session["qkd_key_ids"], session["qkd_sources"], strict=True):
        _say(f"- QKD key {key_id} (KMEs {source})")
    _say(f"joined by the key schedule of {session['version']}, {session['cipher_suite']}")
    _say(f"authentication: {session['auth']}, {session['signature_scheme']}, both ways")
    policy = session["policy"]
    _say(f"policy: post-quantum {policy['post_quantum']}, QKD {policy['psk']}")


# --- processes and files --------------------------------------------------------------------------


@asynccontextmanager
async def _process(command: list[str], **options: Any) -> AsyncIterator[trio.Process]:
    """A process that is ended with the block."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
    async with trio.open_nursery() as nursery:
        run = partial(trio.run_process, command, stderr=subprocess.PIPE, check=False, **options)
        process: trio.Process = await nursery.start(run)
        yield process
        nursery.cancel_scope.cancel()


@contextmanager
def _deadline(complaint: str) -> Iterator[None]:
    """Fails with a complaint when the block takes too long."""
    try:
        with trio.fail_after(_TIMEOUT):
            yield
    except trio.TooSlowError:
        raise DemoFailed(f"{complaint} within {_TIMEOUT:g} s") from None


async def _lines(process: trio.Process) -> AsyncIterator[str]:
    assert process.stdout is not None
    buffer = b""
    async for data in process.stdout:
        *lines, buffer = (buffer + data).split(b"\n")
        for line in lines:
            yield line.decode()
    raise DemoFailed(_complaint(await _rest(process)))


async def _rest(process: trio.Process) -> bytes:
    """All that a process says on standard error."""
    assert process.stderr is not None
    return b"".join([bytes(data) async for data in process.stderr])


def _complaint(told: bytes) -> str:
    """The last line that a program told, as one of ours."""
    lines = told.decode(errors="replace").splitlines() or ["a program ended without a word"]
    return lines[-1].removeprefix("hybridkex: ")


async def _contents(file: trio.Path, process: trio.Process) -> str:
    """What is in a file, once it is there."""
    while not await file.exists():
        if process.returncode is not None:
            raise DemoFailed(_complaint(await _rest(process)))
        await trio.sleep(0.02)
    return await file.read_text()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
