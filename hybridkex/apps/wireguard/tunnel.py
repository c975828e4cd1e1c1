"""One peer of one WireGuard interface, through the command ``wg``."""

import base64
import binascii
import subprocess
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

import trio

from hybridkex import Secret
from hybridkex.errors import ConfigError, LocalStateError
from hybridkex.net.event_loop import in_thread

REKEY_AFTER: Final = 120.0
"""Seconds after which WireGuard negotiates new session keys (whitepaper section 6.1)."""
REJECT_AFTER: Final = 180.0
"""Seconds after which WireGuard stops using session keys (whitepaper section 6.1)."""


class Uncertain(LocalStateError):
    """``wg set`` did not finish in time: the key may or may not be installed."""


@dataclass(frozen=True, kw_only=True)
class Tunnel:
    """One peer of one WireGuard interface.

    Args:
        interface: for example ``wg0``.
        peer_key: the peer's WireGuard public key, in base64.
        command: how to call ``wg``, for example ``("sudo", "wg")``.
        time_limit: seconds for each call. The other end waits for it.

    Raises:
        ConfigError: a value cannot work.
    """

    interface: str
    peer_key: str
    command: tuple[str, ...] = ("wg",)
    time_limit: float = 5.0

    def __post_init__(self) -> None:
        if _decode_key(self.peer_key) is None:
            raise ConfigError("a WireGuard key must be 32 bytes in base64")
        if not self.interface or self.interface.startswith("-") or not self.command:
            raise ConfigError("an interface and the command for wg are needed")
        if not self.time_limit > 0:
            raise ConfigError("the time limit of wg must be positive")

    async def set_psk(self, psk: Secret) -> None:
        """Install a pre-shared key of 32 bytes.

        The key goes through a pipe, never into a file or onto a command line.

        Raises:
            LocalStateError: ``wg`` is missing, failed, or did not finish in time.
        """
        key = base64.b64encode(psk.reveal())
        arguments = ("set", self.interface, "peer", self.peer_key, "preshared-key", "/dev/stdin")
        done = await self._run(arguments, key + b"\n")
        if done.returncode != 0:
            # wg repeats an invalid key in its message.
            raise LocalStateError(f"wg set failed: {_last_line(done).replace(key.decode(), '…')}")

    async def read_psk(self) -> Secret | None:
        """The installed pre-shared key; ``None`` if there is none.

        Raises:
            LocalStateError: the interface has no such peer, or as for :meth:`set_psk`.
        """
        done = await self._run(("show", self.interface, "preshared-keys"))
        if done.returncode != 0:
            raise LocalStateError(f"wg show failed: {_last_line(done)}")
        wanted = _decode_key(self.peer_key)
        for line in done.stdout.decode("ascii", "replace").splitlines():
            peer, _, psk = line.partition("\t")
            if _decode_key(peer) == wanted:
                key = _decode_key(psk)
                return Secret(key) if key is not None else None
        raise LocalStateError(
            f"{self.interface} has no peer {self.peer_key}: add it with its allowed IPs first"
        )

    async def _run(
        self, arguments: tuple[str, ...], stdin: bytes = b""
    ) -> "subprocess.CompletedProcess[bytes]":
        what = f"wg {arguments[0]}"
        try:
            with trio.fail_after(self.time_limit):
                # Not trio.run_process, whose thread may not report when memory is short.
                process = await in_thread(self._start, arguments)
                try:
                    output = await in_thread(process.communicate, stdin, abandon=True)
                finally:
                    process.kill()  # and wait for its end: it has a key in its input
                    with suppress(subprocess.TimeoutExpired):
                        process.wait(timeout=1.0)
        except OSError as error:
            raise LocalStateError(f"cannot run {self.command[0]}: {error.strerror}") from None
        except trio.TooSlowError:
            raise Uncertain(f"{what} did not finish within {self.time_limit:g} s") from None
        return subprocess.CompletedProcess(process.args, process.returncode, *output)

    def _start(self, arguments: tuple[str, ...]) -> "subprocess.Popen[bytes]":
        pipe = subprocess.PIPE
        return subprocess.Popen([*self.command, *arguments], stdin=pipe, stdout=pipe, stderr=pipe)


def _decode_key(text: str) -> bytes | None:
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return key if len(key) == 32 else None


def _last_line(done: "subprocess.CompletedProcess[bytes]") -> str:
    lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"
