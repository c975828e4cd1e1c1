"""The configuration of a channel that the options of a command describe."""

import binascii
import errno
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from cryptography import x509

from hybridkex.auth import (
    Identity,
    InsecureNoVerification,
    KnownPeers,
    Pins,
    RawIdentity,
    TrustStore,
)
from hybridkex.cli.logs import warnings_shown
from hybridkex.cli.options import ChannelOptions
from hybridkex.cli.own_certificate import watched
from hybridkex.cli.qkd_requirement import qkd_requirement
from hybridkex.crypto.kex import ALL_GROUPS, Group, Property
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import ALL_SUITES, SHA256, SHA384
from hybridkex.errors import ConfigError
from hybridkex.files import open_private
from hybridkex.machine import writing
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, KeyLog, ServerConfig
from hybridkex.tls.fresh_keys import FreshKeys
from hybridkex.tls.one_time_pad import OneTimePad
from hybridkex.tls.policy import Policy, Requirement

__all__ = ["client_config", "server_config"]

N = TypeVar("N")

_UNWRITTEN: Final = ("hybridkex.auth.known_peers", "hybridkex.shell.ticket_file")
"""The loggers that warn of a first use that cannot be remembered, and of tickets."""


@asynccontextmanager
async def client_config(
    options: ChannelOptions, *, watch: bool = False, **more: Any
) -> AsyncIterator[ClientConfig]:
    """The client configuration that the options describe; key sources stay open in the context.
    ``watch``: log when our certificate expires, for a client that runs for long."""
    decides, ours = _verifier(options), _identity(options)
    if decides is None and options.cert is not None:
        # A client certificate is used only if the server also authenticates with one.
        decides = TrustStore.system()
    async with _shared_arguments(options) as shared:
        with watched(options.cert, _certificate(ours)) if watch else warnings_shown(*_UNWRITTEN):
            yield ClientConfig(verifier=decides, identity=ours, **shared, **more)


@asynccontextmanager
async def server_config(options: ChannelOptions, **more: Any) -> AsyncIterator[ServerConfig]:
    """The server configuration that the options describe; key sources stay open in the context."""
    ours, decides = _identity(options), _verifier(options)
    async with _shared_arguments(options) as shared:
        if ours is None and decides is not None and (shared.get("psks") or shared["psk_source"]):
            raise ConfigError(
                "--ca, --pin, --known-peers and --insecure apply to the client's certificate, and "
                "a server with only a PSK cannot request it (RFC 9846 section 4.4.2): add a server "
                "certificate with --cert and --key, so that both are used (RFC 9973)"
            )
        if ours is None and not shared.get("psks") and shared["psk_source"] is None:
            raise ConfigError(
                "a server must authenticate itself: give --cert and --key ('hybridkex dev-ca' "
                "makes both for tests), --psk, or a source of QKD keys (--kme, --key-pool)"
            )
        if decides is None and more.get("require_client_certificate"):
            raise ConfigError(
                "--require-client-cert needs trusted authorities or keys: add --ca, --pin or "
                "--known-peers"
            )
        with watched(options.cert, _certificate(ours)):
            yield ServerConfig(
                identities=(ours,) if ours is not None else (),
                client_verifier=decides,
                **shared,
                **more,
            )


@asynccontextmanager
async def _shared_arguments(options: ChannelOptions) -> AsyncIterator[dict[str, Any]]:
    """The keywords that ClientConfig and ServerConfig share."""
    arguments = _channel_arguments(options)
    with _key_log(options.keylog) as log:
        if qkd_requirement(options.qkd) is Requirement.OFF:
            yield {**arguments, "key_log": log, "psk_source": None}
            return
        # Its modules would take a tenth of the start of a command without QKD keys.
        from hybridkex.cli.key_sources import qkd_keys  # noqa: PLC0415

        async with qkd_keys(options.qkd) as keys:
            yield {**arguments, "key_log": log, "psk_source": keys}


def _channel_arguments(options: ChannelOptions) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    post_quantum = Requirement.REQUIRE
    if options.groups is not None:
        groups: tuple[Group, ...] = tuple(_pick("group", options.groups, ALL_GROUPS))
        arguments["groups"] = groups
        if any(Property.POST_QUANTUM not in group.properties for group in groups):
            # Naming a classical group allows it.
            post_quantum = Requirement.PREFER
    if options.suites is not None:
        arguments["suites"] = tuple(_pick("cipher suite", options.suites, ALL_SUITES))
    if options.alpn is not None:
        arguments["alpn"] = tuple(options.alpn)
    qkd = psk = qkd_requirement(options.qkd)
    if options.psk is not None:
        arguments["psks"] = (_psk(options.psk, options),)
        psk = Requirement.REQUIRE
        if qkd is not Requirement.OFF:
            raise ConfigError("--psk and QKD keys exclude each other: a handshake uses one PSK")
    elif options.psk_import is not None or options.psk_hash is not None:
        about = "--psk-hash" if options.psk_import is None else "--psk-import"
        raise ConfigError(f"{about} requires --psk")
    update, fresh_keys = _update_arguments(options, qkd)
    policy = Policy(post_quantum=post_quantum, psk=psk, fresh_keys=fresh_keys)
    return {**arguments, **update, "policy": policy}


def _update_arguments(
    options: ChannelOptions, qkd: Requirement
) -> tuple[dict[str, Any], Requirement]:
    """The keywords about key updates and one-time pads, and what the policy says of updates."""
    arguments: dict[str, Any] = {}
    fresh_keys = Requirement.OFF
    if options.fresh_keys is not None:
        fresh_keys = Requirement(options.fresh_keys_policy or Requirement.REQUIRE.value)
        if options.fresh_keys:
            arguments["fresh_keys"] = FreshKeys(every=options.fresh_keys)
    elif options.fresh_keys_policy is not None:
        raise ConfigError(
            "--fresh-keys-policy requires --fresh-keys: an interval, or 'peer' to let the peer "
            "decide"
        )
    if options.one_time_pad:
        if qkd is Requirement.OFF:
            raise ConfigError("--one-time-pad needs a source of QKD keys: --kme or --key-pool")
        arguments["one_time_pad"] = OneTimePad()
        if fresh_keys is Requirement.OFF:
            fresh_keys = Requirement.REQUIRE
    return arguments, fresh_keys


def _pick(what: str, names: list[str], known: tuple[N, ...]) -> Iterator[N]:
    by_name = {item.name.lower(): item for item in known}  # type: ignore[attr-defined]
    for name in names:
        try:
            yield by_name[name.lower()]
        except KeyError:
            raise ConfigError(f"unknown {what} {name!r}; known are {_names(known)}") from None


def _psk(text: str, options: ChannelOptions) -> ExternalPsk:
    identity, separator, key = text.rpartition(":")
    if not separator:
        raise ConfigError("--psk takes IDENTITY:HEX")
    return ExternalPsk(
        identity=identity.encode(),
        key=Secret(_hex("the key of --psk", key)),
        hash=SHA384 if options.psk_hash == "sha384" else SHA256,
        context=None
        if options.psk_import is None
        else _hex("the context of --psk-import", options.psk_import),
    )


def _hex(what: str, text: str) -> bytes:
    try:
        return binascii.unhexlify(text)
    except ValueError:
        # The text is not shown: it may be part of a key.
        raise ConfigError(f"{what} is not hexadecimal") from None


def _verifier(
    options: ChannelOptions,
) -> TrustStore | Pins | KnownPeers | InsecureNoVerification | None:
    """The verifier of the peer's certificate or raw public key, if the options name one."""
    if options.known_peers is not None:
        if options.insecure or options.ca or options.pin:
            raise ConfigError("--known-peers cannot be combined with --ca, --pin or --insecure")
        return KnownPeers(options.known_peers)
    if options.insecure:
        if options.ca or options.pin:
            raise ConfigError("--insecure cannot be combined with --ca or --pin")
        print(
            "hybridkex: WARNING: --insecure: the peer's certificate is NOT checked; anyone on the "
            "path can read and change everything",
            file=sys.stderr,
        )
        return InsecureNoVerification()
    if options.ca is not None:
        return TrustStore.from_file(options.ca, pins=options.pin)
    return Pins(frozenset(options.pin)) if options.pin else None


def _identity(options: ChannelOptions) -> Identity | RawIdentity | None:
    """Our certificate and key, or a key alone: a raw public key (RFC 7250)."""
    if options.cert is not None and options.key is None:
        raise ConfigError("--cert requires --key")
    if options.key is None:
        return None
    if options.cert is None:
        return RawIdentity.from_file(options.key)
    return Identity.from_files(options.cert, options.key)


def _certificate(ours: Identity | RawIdentity | None) -> x509.Certificate | None:
    return ours.leaf if isinstance(ours, Identity) else None


@contextmanager
def _key_log(path: Path | None) -> Iterator[KeyLog | None]:
    """The sink for ``--keylog``; its file is readable by its owner alone."""
    if path is None:
        yield None
        return
    with writing(path):
        file = open_private(path, append=True)
    failed = False

    def write(line: str) -> None:
        nonlocal failed
        try:
            if file.write(f"{line}\n".encode()) is None:
                raise BlockingIOError(errno.EAGAIN, "its reader does not read")
        except OSError as error:
            # The log is for debugging; connections continue without it.
            if not failed:
                print(
                    f"hybridkex: cannot write {path}: {error.strerror}; connections continue "
                    "without the key log",
                    file=sys.stderr,
                    flush=True,
                )
            failed = True
        else:
            failed = False

    try:
        yield write
    finally:
        file.close()


def _names(items: Any) -> str:
    return ", ".join(item.name for item in items)
