"""The options that ``connect`` and ``listen`` share, and the configuration that they make.

For programs outside of this package, too: ``examples/chat`` has them.
"""

import argparse
import binascii
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

from hybridkex.auth import (
    Identity,
    InsecureNoVerification,
    KnownPeers,
    Pins,
    RawIdentity,
    TrustStore,
)
from hybridkex.cli.key_sources import add_qkd_options, qkd_keys, qkd_requirement
from hybridkex.cli.values import comma_list, file_path
from hybridkex.crypto.kex import ALL_GROUPS, Group, Property
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.crypto.suites import ALL_SUITES, SHA256, SHA384
from hybridkex.errors import ConfigError
from hybridkex.files import open_private
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, KeyLog, Policy, Requirement, ServerConfig

__all__ = ["add_channel_options", "client_config", "server_config"]

N = TypeVar("N")


def add_channel_options(parser: argparse.ArgumentParser, *, alpn: str | None = None) -> None:
    """Everything but the address.

    Args:
        alpn: the application protocol of a command that speaks one; without it the user names some.
    """
    trust = parser.add_argument_group("whom to trust")
    trust.add_argument(
        "--ca",
        type=file_path,
        metavar="FILE",
        help="authorities that may vouch for the peer (PEM; a client's default: the system's)",
    )
    trust.add_argument(
        "--pin",
        metavar="HEX",
        action="append",
        default=[],
        help="SHA-256 of the peer's public key (SPKI); with --ca both must hold",
    )
    trust.add_argument(
        "--known-peers",
        type=file_path,
        metavar="FILE",
        help="raw public keys by name, as known_hosts; a new server is trusted and remembered",
    )
    trust.add_argument(
        "--insecure", action="store_true", help="do not check the peer's certificate at all"
    )
    own = parser.add_argument_group("who we are")
    own.add_argument(
        "--cert", type=file_path, metavar="FILE", help="our certificate chain (PEM, leaf first)"
    )
    own.add_argument(
        "--key",
        type=file_path,
        metavar="FILE",
        help="its private key (PEM); without --cert, a raw public key",
    )
    psk = parser.add_argument_group("pre-shared key")
    psk.add_argument(
        "--psk",
        metavar="IDENTITY:HEX",
        help="an external PSK; together with certificates it is used by RFC 9973. "
        "Other users of this machine can see it in the process list",
    )
    psk.add_argument(
        "--psk-hash",
        choices=("sha256", "sha384"),
        default="sha256",
        help="the hash that the PSK is for, and with it the suites (default: %(default)s)",
    )
    psk.add_argument(
        "--psk-import", metavar="CONTEXT_HEX", help="import the PSK by RFC 9258, with this context"
    )
    tls = parser.add_argument_group("what to offer or accept")
    tls.add_argument(
        "--groups",
        type=comma_list,
        metavar="LIST",
        help=f"favourite first, of {_names(ALL_GROUPS)} (default: the post-quantum ones)",
    )
    tls.add_argument(
        "--suites",
        type=comma_list,
        metavar="LIST",
        help=f"favourite first, of {_names(ALL_SUITES)} (default: all)",
    )
    if alpn is not None:
        parser.set_defaults(alpn=[alpn])
    else:
        tls.add_argument(
            "--alpn", type=comma_list, metavar="LIST", help="application protocols, favourite first"
        )
    output = parser.add_argument_group("output")
    output.add_argument(
        "--json", action="store_true", help="print the session as one JSON line on standard error"
    )
    output.add_argument(
        "--keylog",
        type=file_path,
        metavar="FILE",
        help="append the session's secrets to FILE, for Wireshark: whoever has them reads all",
    )
    add_qkd_options(parser)
    parser.add_argument("--bind", metavar="ADDR", help="the local IP address (default: any)")


def _names(items: Any) -> str:
    return ", ".join(item.name for item in items)


@asynccontextmanager
async def client_config(args: argparse.Namespace, **more: Any) -> AsyncIterator[ClientConfig]:
    """The client that the options describe; its key sources and files are open meanwhile."""
    async with _shared_arguments(args) as shared:
        decides = _verifier(args)
        if decides is None and args.cert is not None:
            # Whoever has a certificate wants to use it, which needs the server's, too.
            decides = TrustStore.system()
        yield ClientConfig(verifier=decides, identity=_identity(args), **shared, **more)


@asynccontextmanager
async def server_config(args: argparse.Namespace, **more: Any) -> AsyncIterator[ServerConfig]:
    """The server that the options describe; its key sources and files are open meanwhile."""
    async with _shared_arguments(args) as shared:
        ours, decides = _identity(args), _verifier(args)
        if ours is None and decides is not None and (shared.get("psks") or shared["psk_source"]):
            raise ConfigError(
                "--ca, --pin, --known-peers and --insecure are about the client's certificate, and "
                "a server that has only a PSK cannot ask for it (RFC 9846 section 4.4.2): add our "
                "own with --cert and --key, so that both are used (RFC 9973)"
            )
        yield ServerConfig(
            identities=(ours,) if ours is not None else (),
            client_verifier=decides,
            **shared,
            **more,
        )


@asynccontextmanager
async def _shared_arguments(args: argparse.Namespace) -> AsyncIterator[dict[str, Any]]:
    """The keywords that ClientConfig and ServerConfig share."""
    arguments = _channel_arguments(args)
    with _key_log(args.keylog) as log:
        async with qkd_keys(args) as keys:
            yield {**arguments, "key_log": log, "psk_source": keys}


def _channel_arguments(args: argparse.Namespace) -> dict[str, Any]:
    arguments: dict[str, Any] = {}
    post_quantum = Requirement.REQUIRE
    if args.groups is not None:
        groups: tuple[Group, ...] = tuple(_pick("group", args.groups, ALL_GROUPS))
        arguments["groups"] = groups
        if any(Property.POST_QUANTUM not in group.properties for group in groups):
            # Whoever lists a classical group by name wants it.
            post_quantum = Requirement.PREFER
    if args.suites is not None:
        arguments["suites"] = tuple(_pick("cipher suite", args.suites, ALL_SUITES))
    if args.alpn is not None:
        arguments["alpn"] = tuple(args.alpn)
    if args.psk is not None:
        arguments["psks"] = (_psk(args),)
    elif args.psk_import is not None:
        raise ConfigError("--psk-import goes with --psk")
    qkd = qkd_requirement(args)
    if qkd is not Requirement.OFF and args.psk is not None:
        raise ConfigError("--psk and QKD keys exclude each other: one PSK goes into a handshake")
    psk = Requirement.REQUIRE if args.psk is not None else qkd
    arguments["policy"] = Policy(post_quantum=post_quantum, psk=psk)
    return arguments


def _pick(what: str, names: list[str], known: tuple[N, ...]) -> Iterator[N]:
    by_name = {item.name.lower(): item for item in known}  # type: ignore[attr-defined]
    for name in names:
        try:
            yield by_name[name.lower()]
        except KeyError:
            raise ConfigError(f"unknown {what} {name!r}; known are {_names(known)}") from None


def _psk(args: argparse.Namespace) -> ExternalPsk:
    identity, separator, key = args.psk.rpartition(":")
    if not separator:
        raise ConfigError("--psk takes IDENTITY:HEX")
    return ExternalPsk(
        identity=identity.encode(),
        key=Secret(_hex("the key of --psk", key)),
        hash=SHA384 if args.psk_hash == "sha384" else SHA256,
        context=None
        if args.psk_import is None
        else _hex("the context of --psk-import", args.psk_import),
    )


def _hex(what: str, text: str) -> bytes:
    try:
        return binascii.unhexlify(text)
    except ValueError:
        # The text is not shown: it may be most of a key.
        raise ConfigError(f"{what} is not hexadecimal") from None


def _verifier(
    args: argparse.Namespace,
) -> TrustStore | Pins | KnownPeers | InsecureNoVerification | None:
    """What decides about the peer's certificate or raw public key, if anything was asked for."""
    if args.known_peers is not None:
        if args.insecure or args.ca or args.pin:
            raise ConfigError("--known-peers contradicts --ca, --pin and --insecure")
        return KnownPeers(args.known_peers)
    if args.insecure:
        if args.ca or args.pin:
            raise ConfigError("--insecure contradicts --ca and --pin")
        print(
            "hybridkex: WARNING: --insecure: the peer's certificate is NOT checked; "
            "anybody in between can read and change everything",
            file=sys.stderr,
        )
        return InsecureNoVerification()
    if args.ca is not None:
        return TrustStore.from_file(args.ca, pins=args.pin)
    return Pins(frozenset(args.pin)) if args.pin else None


def _identity(args: argparse.Namespace) -> Identity | RawIdentity | None:
    """Our certificate and key, or a key alone: a raw public key (RFC 7250)."""
    if args.cert is not None and args.key is None:
        raise ConfigError("--cert and --key go together")
    if args.key is None:
        return None
    if args.cert is None:
        return RawIdentity.from_file(args.key)
    return Identity.from_files(args.cert, args.key)


@contextmanager
def _key_log(path: str | None) -> Iterator[KeyLog | None]:
    """The sink for ``--keylog``; its file is readable by its owner alone."""
    if path is None:
        yield None
        return
    try:
        file = open_private(path, append=True)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror}") from None
    failed = False

    def write(line: str) -> None:
        nonlocal failed
        try:
            file.write(f"{line}\n".encode())
        except OSError as error:
            # The log is for a debugger; connections go on without it.
            if not failed:
                print(
                    f"hybridkex: cannot write {path}: {error.strerror}; connections go on",
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
