"""``hybridkex kme``: run a KME, move its keys, query one, fill key pools, set up two test sites.

``docs/kme.md`` describes the configuration file and each step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument, nested, option
from hybridkex.cli.choices import KME_TLS_KINDS, PRODUCERS
from hybridkex.cli.logs import log_format, log_level
from hybridkex.cli.qkd_options import KmeOptions
from hybridkex.cli.values import folder_path, kilometres, tcp_address
from hybridkex.net.address import TcpAddress


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    config: Path = argument("a TOML file, see docs/kme.md")
    check: bool = option(
        "check the file, certificates, key files and the connection to databases, and exit"
    )
    metrics: TcpAddress | None = option(
        "serve the metrics at this HOST:PORT, whatever the file says: each process has its own",
        type=tcp_address,
        metavar="ADDR",
    )
    log_level: str = log_level("warning")
    log_format: str = log_format()


@dataclass(frozen=True, kw_only=True)
class MigrateOptions:
    config: Path = argument("a TOML file in which store is already the database")
    source: Path = option("the store file whose keys are moved", "--from")
    kme: str | None = option(
        "the KME whose store it is (default: the only one of the file)", metavar="ID"
    )


@dataclass(frozen=True, kw_only=True)
class VerifyAuditOptions:
    folders: list[Path] = argument(
        "the folder of the audit trail, and those to which its files were moved", metavar="DIR"
    )
    head: list[str] = option(
        "a SHA-256 that was kept elsewhere and must be in the trail; may be repeated",
        metavar="HEX",
    )


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    access: KmeOptions = nested(required=("kme", "kme_ca", "kme_cert", "kme_key"))
    sae: str = option("our own SAE ID", metavar="ID")
    peer_sae: str = option("the peer's SAE ID", metavar="ID")


@dataclass(frozen=True, kw_only=True)
class ExportPoolOptions(StatusOptions):
    """``kme export-pool``."""

    key_pool: Path = option("the pool file")
    pool_key: Path = option("the key file that encrypts it; created if missing")
    ids: Path = option("key IDs: the master writes them, the slave reads them")
    number: int = option("keys to draw (default: 100)", default=100)
    role: str = option(
        "master: draw new keys; slave: collect the keys of --ids (default: %(default)s)",
        choices=("master", "slave"),
        default="master",
    )


@dataclass(frozen=True, kw_only=True)
class DevUpOptions:
    folder: Path = argument(
        "the folder to write to; created if missing", type=folder_path, metavar="DIR"
    )
    ports: str = option(
        "the two KMEs' ports; 0 picks free ones (default: %(default)s)",
        metavar="A,B",
        default="8443,8444",
    )
    tls: str = option(
        "TLS between SAE and KME (default: %(default)s)", choices=KME_TLS_KINDS, default="stdlib"
    )
    producer: str = option(
        "what makes the keys: random numbers or a simulated QKD link (default: %(default)s)",
        choices=PRODUCERS,
        default="random",
    )
    distance: float | None = option(
        "length of the QKD link's fibre (default: 50)", type=kilometres, metavar="KM"
    )
    metrics: TcpAddress | None = option(
        "serve Prometheus metrics at this HOST:PORT", type=tcp_address, metavar="ADDR"
    )
    no_serve: bool = option("write the files and exit")
    log_level: str = log_level("warning")


def _action(options: type, function: str, extra: str = "kme", reloads: bool = False) -> Action:
    return Action("kme", options, extra=extra, function=function, reloads=reloads)


_COMMANDS: Final = {
    "serve": Command(
        "Run the KMEs of a configuration file until SIGTERM or SIGINT. SIGHUP reloads the file and "
        "the certificates; an invalid file changes nothing.",
        examples=[
            "kme serve kme.toml",
            "kme serve kme.toml --check",
            "kme serve kme.toml --log-level info --log-format json",
        ],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start; with --check, 0 when it could",
        notes="See docs/kme.md.",
        summary="run the KMEs of a configuration file",
        action=_action(ServeOptions, "serve", reloads=True),
    ),
    "migrate": Command(
        "Move all keys of a store file into the PostgreSQL database that the configuration names. "
        "No KME may have the file open. A move that was interrupted, even by SIGKILL, continues "
        "when the command is run again; until it is complete, neither store can be served, and "
        "afterwards only the database can. The keys of the file are erased at the end.",
        examples=["kme migrate kme.toml --from keys.db"],
        status="0 when all keys are in the database, 1 otherwise",
        notes="See docs/kme.md.",
        summary="move the keys of a store file to PostgreSQL",
        action=_action(MigrateOptions, "migrate", extra="kme,postgres"),
    ),
    "verify-audit": Command(
        "Verify that no record of an audit trail was changed, removed, inserted or moved, and "
        "print the head of each file. Keep heads elsewhere: a later --head shows that what was "
        "there then is there still.",
        examples=[
            "kme verify-audit audit",
            "kme verify-audit audit archive --head 9f86d081884c...",
        ],
        status="0 when the trail is whole, 1 otherwise",
        notes="See docs/kme.md.",
        summary="verify the audit trail of a KME",
        action=_action(VerifyAuditOptions, "verify_audit"),
    ),
    "status": Command(
        "Ask a KME how many keys it has for us and a peer, and for its limits (ETSI GS QKD 014, "
        "clause 5.1). No key is drawn.",
        examples=[
            "kme status --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem \\\n"
            "      --kme-key a.key --sae sae-a --peer-sae sae-b",
        ],
        summary="print a KME's status for a peer, as JSON",
        action=_action(StatusOptions, "status"),
    ),
    "export-pool": Command(
        "As the master (the default), draw --number keys for the peer into a pool file and write "
        "their IDs to --ids. As the slave, collect the keys whose IDs the peer wrote. Run it in "
        "both roles at both sites. Other commands use the pool with --key-pool, for example where "
        "no KME can be reached.",
        examples=[
            "kme export-pool --key-pool a.pool --pool-key a.pool.key --ids ids \\\n"
            "      --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem \\\n"
            "      --kme-key a.key --sae sae-a --peer-sae sae-b",
        ],
        summary="draw keys from a KME into a pool file",
        action=_action(ExportPoolOptions, "export_pool"),
    ),
    "dev-up": Command(
        "Make certificates, keys and configuration for two sites, and run both their KMEs. The "
        "commands for 'listen' and 'connect' that use them are printed.",
        examples=["kme dev-up sites", "kme dev-up sites --producer link --distance 80"],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
        notes="For tests and first steps: both sites' keys are on one machine. See docs/kme.md.",
        summary="make certificates and configuration for two sites, and run both KMEs",
        action=_action(DevUpOptions, "dev_up", reloads=True),
    ),
}

COMMAND: Final = Command(
    "A key management entity (KME) delivers the keys of a QKD link to the applications (SAEs) "
    "of its site over mutual TLS, as specified by ETSI GS QKD 014.",
    examples=["kme dev-up sites", "kme serve kme.toml"],
    notes="See docs/kme.md.",
    commands=_COMMANDS,
)
