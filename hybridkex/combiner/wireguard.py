"""A WireGuard tunnel whose pre-shared key rests on everything that :func:`exchange` combines.

WireGuard mixes a pre-shared key into each of its handshakes, which is what protects a recorded
tunnel from a quantum computer, and leaves open where the key comes from. Here both ends agree on a
fresh one every two minutes, as often as WireGuard itself makes new session keys.

The responder installs the new key first and says so, then the initiator does. A handshake of the
tunnel in between fails and is tried again within seconds, while the session before it lives on for
a minute at least (whitepaper section 6.1: 120 and 180 s): no packet is lost.
"""

import base64
import binascii
import subprocess
from dataclasses import dataclass
from typing import Any, Final

import trio

from hybridkex.combiner.exchange import ExchangeConfig, Exchanged, Role, exchange
from hybridkex.errors import ConfigError, IllegalParameter, LocalStateError, TruncationError
from hybridkex.secret import Secret

__all__ = ["REKEY_AFTER", "Tunnel", "rotate"]

REKEY_AFTER: Final = 120.0
"""Seconds after which WireGuard makes new session keys (REKEY_AFTER_TIME)."""

_LABEL: Final = b"hybridkex wireguard psk v1"
_INSTALLED: Final = b"\x01"


@dataclass(frozen=True, kw_only=True)
class Tunnel:
    """One peer of one WireGuard interface.

    Args:
        interface: for example ``wg0``.
        peer_key: the peer's WireGuard public key, in base64.
        command: how ``wg`` is called; with a prefix such as ``("sudo", "wg")`` if need be.
        time_limit: seconds that it may take; the other end waits for it.
    """

    interface: str
    peer_key: str
    command: tuple[str, ...] = ("wg",)
    time_limit: float = 5.0

    def __post_init__(self) -> None:
        try:
            key = base64.b64decode(self.peer_key, validate=True)
        except binascii.Error:
            key = b""
        if len(key) != 32:
            raise ConfigError("a WireGuard key is 32 bytes in base64")
        if not self.interface or self.interface.startswith("-") or not self.command:
            raise ConfigError("an interface and the command that sets it up are needed")
        if not self.time_limit > 0:
            raise ConfigError("the time limit of wg is positive")

    async def set_psk(self, psk: Secret) -> None:
        """Install a key; it goes through a pipe, never through a file or the process list.

        Raises:
            LocalStateError: ``wg`` is not there, refused, or did not end in time.
        """
        key = base64.b64encode(psk.reveal())
        arguments = [*self.command, "set", self.interface, "peer", self.peer_key]
        arguments += ["preshared-key", "/dev/stdin"]
        try:
            with trio.fail_after(self.time_limit):
                done = await trio.run_process(
                    arguments,
                    stdin=key + b"\n",
                    capture_stdout=True,
                    capture_stderr=True,
                    check=False,
                )
        except OSError as error:
            raise LocalStateError(f"cannot run {self.command[0]}: {error.strerror}") from None
        except trio.TooSlowError:
            raise LocalStateError(f"wg set did not end within {self.time_limit:g} s") from None
        if done.returncode != 0:
            raise LocalStateError(f"wg set failed: {_last_line(done, key)}")


def _last_line(done: "subprocess.CompletedProcess[bytes]", key: bytes) -> str:
    """What the command complained of; wg repeats a key that it does not like."""
    said = done.stderr.replace(key, b"(the key)").decode("utf-8", "replace")
    lines = said.strip().splitlines()
    return lines[-1] if lines else f"exit status {done.returncode}"


async def rotate(
    stream: trio.abc.Stream, tunnel: Tunnel, *, role: Role, **options: Any
) -> Exchanged:
    """Agree on a pre-shared key and install it on both sides.

    Args:
        options: the rest of what :func:`~hybridkex.combiner.exchange` takes, but ``label`` and
            ``length``.

    Raises what ``exchange`` raises, and :class:`~hybridkex.errors.LocalStateError` when ``wg``
    fails; the key before it stays in force then.
    """
    config = ExchangeConfig(role=role, label=_LABEL, length=32, **options)
    result = await exchange(stream, config)
    try:
        if role == "responder":
            await tunnel.set_psk(result.key)
            await stream.send_all(_INSTALLED)
            return result
        word = b""
        with trio.move_on_after(options.get("time_limit", 10.0)):
            word = bytes(await stream.receive_some(1))
    except trio.BrokenResourceError as error:
        raise TruncationError(f"the peer is gone: {error}") from None
    if not word:
        raise TruncationError("the responder did not install the key")
    if word != _INSTALLED:
        raise IllegalParameter("the responder said something else than that it has the key")
    await tunnel.set_psk(result.key)
    return result
