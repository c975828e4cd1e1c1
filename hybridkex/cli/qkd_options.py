"""The options that say where QKD keys come from."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.choices import KME_ID_RULES, KME_TLS_KINDS
from hybridkex.cli.values import file_path
from hybridkex.tls.policy import Requirement

__all__ = [
    "KmeOptions",
    "QkdOptions",
    "add_exchange_qkd_options",
    "add_kme_options",
    "add_qkd_options",
]


@dataclass(frozen=True, kw_only=True)
class KmeOptions:
    """Which KME, and how to reach it."""

    kme: str | None
    kme_ca: Path | None
    kme_cert: Path | None
    kme_key: Path | None
    kme_id: str | None
    kme_id_rule: str | None
    kme_tls: str | None


@dataclass(frozen=True, kw_only=True)
class QkdOptions:
    """Where the QKD keys come from, and whether there must be some."""

    kme: KmeOptions
    sae: str | None
    peer_sae: list[str]
    peer_kme_id: str | None
    key_pool: Path | None
    pool_key: Path | None
    requirement: str | None


def add_kme_options(parser: argparse._ActionsContainer, *, required: bool) -> None:
    """Which KME, and how to reach it."""
    parser.add_argument(
        "--kme", required=required, metavar="URL", help="the KME of our site, as https://host:port"
    )
    for name, text in (
        ("ca", "the authority of the KME's certificate"),
        ("cert", "the certificate that names our SAE to it"),
        ("key", "its private key"),
    ):
        parser.add_argument(
            f"--kme-{name}", type=file_path, required=required, metavar="FILE", help=f"{text} (PEM)"
        )
    parser.add_argument("--kme-id", metavar="ID", help="the ID its certificate must have")
    parser.add_argument(
        "--kme-id-rule",
        choices=KME_ID_RULES,
        help=f"where in its certificate the ID is (default: {KME_ID_RULES[0]})",
    )
    parser.add_argument(
        "--kme-tls",
        choices=KME_TLS_KINDS,
        help="TLS to the KME: the standard library's, or our own, which is post-quantum "
        f"(default: {KME_TLS_KINDS[0]})",
    )


def add_qkd_options(parser: argparse.ArgumentParser) -> None:
    """Everything about the QKD leg of a channel."""
    group = parser.add_argument_group(
        "QKD keys",
        "With certificates they are used by RFC 9973, without they authenticate both sides.",
    )
    _add_source_options(group, peers="the peer's SAE ID; a listener may have several")
    group.add_argument(
        "--qkd",
        dest="requirement",
        choices=[one.value for one in Requirement],
        help="no connection without a QKD key (require, the default once there is a source), "
        "one without that says so (prefer), or none (off)",
    )


def add_exchange_qkd_options(parser: argparse.ArgumentParser) -> None:
    """QKD keys of an exchange outside TLS, where nothing is negotiated: all rotations or none."""
    group = parser.add_argument_group(
        "QKD keys", "With --kme or --key-pool, given at both ends, a QKD key goes into each key."
    )
    _add_source_options(group, peers="the peer's SAE ID")
    parser.set_defaults(requirement=None)


def _add_source_options(group: argparse._ArgumentGroup, *, peers: str) -> None:
    add_kme_options(group, required=False)
    group.add_argument("--sae", metavar="ID", help="our own SAE ID")
    group.add_argument("--peer-sae", metavar="ID", action="append", default=[], help=peers)
    group.add_argument(
        "--peer-kme-id",
        metavar="ID",
        help="the ID of the peer's KME, where the status of ours hides it",
    )
    group.add_argument(
        "--key-pool",
        type=file_path,
        metavar="FILE",
        help="keys that 'kme export-pool' placed here; beside --kme, where the KME fails",
    )
    group.add_argument(
        "--pool-key", type=file_path, metavar="FILE", help="its key file (default: FILE.key)"
    )
