"""The options that say where QKD keys come from."""

from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Group, nested, option
from hybridkex.cli.choices import KME_ID_RULES, KME_TLS_KINDS
from hybridkex.tls.policy import Requirement
from hybridkex.values import value

CHANNEL_KEYS: Final = Group(
    "QKD keys",
    "With certificates, they are combined with these by RFC 9973. Without, they authenticate both "
    "sides.",
)
EXCHANGE_KEYS: Final = Group(
    "QKD keys", "With --kme or --key-pool at both ends, each key is derived from a QKD key, too."
)


@value(kw_only=True)
class KmeOptions:
    """The KME, and the TLS settings to reach it."""

    kme: str | None = option("the KME of our site, as https://host:port", metavar="URL")
    kme_ca: Path | None = option("the authority of the KME's certificate (PEM)")
    kme_cert: Path | None = option("the certificate that names our SAE to it (PEM)")
    kme_key: Path | None = option("its private key (PEM)")
    kme_id: str | None = option("the ID its certificate must have", metavar="ID")
    kme_id_rule: str | None = option(
        f"where in its certificate the ID is (default: {KME_ID_RULES[0]})", choices=KME_ID_RULES
    )
    kme_tls: str | None = option(
        "TLS to the KME: the standard library's, or our own, which is post-quantum "
        f"(default: {KME_TLS_KINDS[0]})",
        choices=KME_TLS_KINDS,
    )


@value(kw_only=True)
class QkdOptions:
    """The source of the QKD keys, and whether one is required."""

    kme: KmeOptions = nested()
    sae: str | None = option("our own SAE ID", metavar="ID")
    peer_sae: list[str] = option("the peer's SAE ID; a listener may have several", metavar="ID")
    peer_kme_id: str | None = option(
        "the ID of the peer's KME, if the status of our KME does not give it", metavar="ID"
    )
    key_pool: Path | None = option(
        "a pool that 'kme export-pool' filled; with --kme, used when the KME fails"
    )
    pool_key: Path | None = option("its key file (default: FILE.key)")
    requirement: str | None = option(
        "require a QKD key (require, the default where a source is given), connect without one if "
        "there is none and say so (prefer), or use none (off)",
        "--qkd",
        choices=[one.value for one in Requirement],
    )


@value(kw_only=True)
class ExchangeQkdOptions(QkdOptions):
    """The options of an exchange outside TLS, which negotiates nothing: all rotations use QKD keys
    or none does."""

    peer_sae: list[str] = option("the peer's SAE ID", metavar="ID")
