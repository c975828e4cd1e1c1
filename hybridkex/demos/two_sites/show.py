"""The demonstration itself: starts the programs and reports what they did."""

import hashlib
import json
import math
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any, Final
from urllib.request import ProxyHandler, build_opener

import trio
from prometheus_client.parser import text_string_to_metric_families

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.demos.rndl.now.tap import wire_tap
from hybridkex.demos.two_sites.marked import mark, new_marker, unmark
from hybridkex.demos.two_sites.overheard import overhear
from hybridkex.demos.two_sites.processes import (
    DemonstrationFailed,
    contents,
    deadline,
    failure,
    finished,
    lines,
    running,
)
from hybridkex.files import open_private
from hybridkex.net.event_loop import in_thread

_COMMAND: Final = (sys.executable, "-m", "hybridkex")
_SITES: Final = ("alice", "bob")
_PAGE_SECONDS: Final = 10.0


@dataclass(frozen=True, kw_only=True)
class Demonstration:
    """One run.

    Args:
        folder: a private folder, for all files of the two sites.
        source: the file to send.
        capture: where Eve records.
        distance: length of the QKD link, in km.
        print_line: prints a line.
    """

    folder: Path
    source: Path
    capture: Path
    distance: float
    print_line: Callable[[str], object]
    marker: bytes = field(default_factory=new_marker, repr=False)

    async def run(self) -> None:
        """Run it.

        Raises:
            DemonstrationFailed: a program failed, or the file did not arrive whole.
            RecordingError: Eve's recording shows part of the file, or could not be searched.
        """
        self.print_line("\n1. Two sites and the QKD link between them")
        async with self._kmes() as urls:
            self.print_line("\n2. Alice sends Bob a file")
            session = await self._transfer(urls)
        self.print_line("\n3. What Eve recorded on the way")
        await in_thread(self._report_recording)
        self.print_line("\n4. What the keys are derived from")
        self._report_session(session)

    def _print_detail(self, text: str) -> None:
        self.print_line(f"   {text}")

    # --- the sites ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _kmes(self) -> AsyncIterator[dict[str, str]]:
        """Run both KMEs, fed by a QKD link, and wait for keys; yields the URL of each SAE's KME."""
        command = [*_COMMAND, "kme", "dev-up", str(self.folder / "sites"), "--ports", "0,0"]
        command += ["--tls", "hybridkex", "--producer", "link", "--distance", str(self.distance)]
        command += ["--metrics", "127.0.0.1:0"]
        async with running(command) as process, aclosing(lines(process)) as output:
            with deadline("the KMEs did not start"):
                urls = [(await anext(output)).split()[-1] for _ in range(2)]
                metrics = (await anext(output)).split()[-1]
            with deadline(f"the QKD link over {self.distance:g} km produced no keys"):
                try:
                    link = await _first_keys(metrics)
                except (OSError, HTTPException):  # the KMEs have ended
                    raise failure(await finished(process)) from None
            self._print_detail(
                f"decoy-state BB84 over {self.distance:g} km of simulated fibre, with the complete "
                "post-processing:"
            )
            self._print_detail(
                f"{link['sifted_bits_total']:,.0f} sifted bits, QBER {link['qber_ratio']:.2%}, "
                f"{link['secret_bits_total']:,.0f} secret bits"
            )
            self._print_detail(
                "a KME at each end; every program gets its keys from the KME of its site"
            )
            self._print_detail("(ETSI GS QKD 014, over post-quantum TLS)")
            yield dict(zip(_SITES, urls, strict=True))

    def _options(self, who: str, peer: str, url: str) -> list[str]:
        words = ["--kme", url, "--kme-tls", "hybridkex", "--sae", who, "--peer-sae", peer]
        for option in ("ca", "cert", "key"):
            words += [f"--{option}", str(self.folder / who / f"{option}.pem")]
            words += [f"--kme-{option}", str(self.folder / "sites" / who / f"{option}.pem")]
        return words

    # --- the file -------------------------------------------------------------------------------

    @property
    def _sent(self) -> Path:
        return self.folder / "sent"

    async def _transfer(self, urls: dict[str, str]) -> dict[str, Any]:
        """Send the file through the tap and compare; returns Alice's report of the session."""
        authority = DevCa.create()
        write_identity(self.folder / "bob", authority, authority.issue("localhost", "127.0.0.1"))
        write_identity(self.folder / "alice", authority, authority.issue("alice"))
        self._print_detail("each has a certificate of a development authority")
        await in_thread(mark, self.source, self._sent, self.marker)
        marked, received = self.folder / "marked", self.folder / "received"
        began = time.monotonic()
        session = await self._run_programs(urls, marked)
        seconds = time.monotonic() - began
        await in_thread(unmark, marked, received, self.marker)
        digest = _digest(self.source)
        if digest != _digest(received):
            raise DemonstrationFailed("the file that arrived is not the file that was sent")
        size = self.source.stat().st_size
        self._print_detail(
            f"{self.source.name}, {size:,} bytes, in {seconds:.2f} s (start of both programs "
            "included)"
        )
        self._print_detail(f"SHA-256 at both ends: {digest}")
        return session

    async def _run_programs(self, urls: dict[str, str], target: Path) -> dict[str, Any]:
        """Run ``listen`` and ``connect``, with Eve's tap between them."""
        port_file = self.folder / "port"
        listen = [*_COMMAND, "listen", "0", "--bind", "127.0.0.1", "--once"]
        listen += ["--port-file", str(port_file), "--require-client-cert"]
        listen += self._options("bob", "alice", urls["bob"])
        options = self._options("alice", "bob", urls["alice"])
        with open_private(target) as sink, self._sent.open("rb") as file:
            async with running(listen, stdout=sink.fileno()) as receiver:
                with deadline("the listener did not open its port"):
                    port = int(await contents(trio.Path(port_file), receiver))
                with deadline("the transfer did not end"):
                    async with wire_tap(self.capture, ("127.0.0.1", port)) as (_, tapped):
                        sender = await trio.run_process(
                            [*_COMMAND, "connect", "localhost", str(tapped), "--json", *options],
                            stdin=file,
                            stdout=subprocess.DEVNULL,
                            capture_stderr=True,
                            check=False,
                        )
                        both = await finished(receiver), sender
        if any(one.returncode for one in both):
            # A signal, which is negative, is the cause of what the other program says.
            raise failure(min(both, key=lambda one: one.returncode or math.inf))
        session: dict[str, Any] = json.loads(sender.stderr.splitlines()[0])
        return session

    # --- the reports ----------------------------------------------------------------------------

    def _report_recording(self) -> None:
        overheard = overhear(self.capture, self._sent, self.marker)
        self._print_detail(f"{overheard.records:,} records, {overheard.size:,} bytes")
        self._print_detail(
            f"in the clear: server name {overheard.server_name}, group {overheard.group},"
        )
        self._print_detail(
            f"  the public shares, and the ID (not the key) {', '.join(overheard.key_ids)}"
        )
        self._print_detail("a random marker was sent with every kilobyte of the file: each of the")
        self._print_detail(
            f"{overheard.records:,} records was searched for it and for {overheard.needles - 1} "
            "pieces of the file; none is there"
        )
        self._print_detail("to read the file later, an eavesdropper must break ALL of these:")
        self._print_detail(
            "'hybridkex rndl' demonstrates this with an adversary who breaks some or all of them"
        )

    def _report_session(self, session: dict[str, Any]) -> None:
        for part in session["parts"]:
            self._print_detail(f"- {part}")
        for key_id, source in zip(session["qkd_key_ids"], session["qkd_sources"], strict=True):
            self._print_detail(f"- QKD key {key_id} (KMEs {source})")
        self._print_detail(
            f"joined by the key schedule of {session['version']}, {session['cipher_suite']}"
        )
        self._print_detail(
            f"authentication: {session['auth']}, {session['signature_scheme']}, both ways"
        )
        policy = session["policy"]
        self._print_detail(f"policy: post-quantum {policy['post_quantum']}, QKD {policy['psk']}")


async def _first_keys(metrics: str) -> dict[str, float]:
    """The link's metrics, once both KMEs have its keys."""
    while True:
        found: dict[str, float] = {}
        produced = []
        text = await in_thread(_page, metrics, abandon=True)
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                # A KME counts its stock every 10 s only, and these when it has stored them.
                if sample.name == "hybridkex_kme_keys_produced_total":
                    produced.append(sample.value)
                elif sample.labels.get("kme") == "kme-a":
                    found[sample.name.removeprefix("hybridkex_qkd_link_")] = sample.value
        if len(produced) == len(_SITES) and all(produced):
            return found
        await trio.sleep(0.1)


def _page(url: str) -> str:
    # Without the proxy that the environment may name.
    with build_opener(ProxyHandler({})).open(url, timeout=_PAGE_SECONDS) as answer:
        text: str = answer.read().decode()
        return text


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
