"""``hybridkex kme``: run a KME, query one, fill key pools, set up two test sites.

``docs/kme.md`` describes the configuration file and each step.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

from hybridkex.cli.arguments import Action
from hybridkex.cli.choices import KME_TLS_KINDS, PRODUCERS
from hybridkex.cli.help_text import describe
from hybridkex.cli.logs import add_log_options
from hybridkex.cli.qkd_options import KmeOptions, add_kme_options
from hybridkex.cli.values import file_path, folder_path, number, whole_number
from hybridkex.errors import ConfigError
from hybridkex.net.address import TcpAddress, parse_tcp_address

__all__ = ["DevUpOptions", "ExportPoolOptions", "ServeOptions", "StatusOptions", "configure"]


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """``kme serve``."""

    config: Path
    log_level: str


@dataclass(frozen=True, kw_only=True)
class StatusOptions:
    """``kme status``."""

    access: KmeOptions
    sae: str
    peer_sae: str


@dataclass(frozen=True, kw_only=True)
class ExportPoolOptions(StatusOptions):
    """``kme export-pool``."""

    key_pool: Path
    pool_key: Path
    ids: Path
    number: int
    role: str


@dataclass(frozen=True, kw_only=True)
class DevUpOptions:
    """``kme dev-up``."""

    folder: Path
    ports: str
    tls: str
    producer: str
    distance: float | None
    metrics: TcpAddress | None
    no_serve: bool
    log_level: str


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    describe(
        parser,
        "A key management entity (KME) delivers the keys of a QKD link to the applications (SAEs) "
        "of its site over mutual TLS, as specified by ETSI GS QKD 014.",
        examples=["kme dev-up sites", "kme serve kme.toml"],
        notes="See docs/kme.md.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    serve = commands.add_parser("serve", help="run the KMEs of a configuration file")
    describe(
        serve,
        "Run the KMEs of a configuration file until SIGTERM or SIGINT. SIGHUP reloads the file and "
        "the certificates; an invalid file changes nothing.",
        examples=["kme serve kme.toml", "kme serve kme.toml --log-level info"],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
        notes="See docs/kme.md.",
    )
    serve.add_argument(
        "config", type=file_path, metavar="FILE", help="a TOML file, see docs/kme.md"
    )
    add_log_options(serve, default="warning")
    serve.set_defaults(action=_action(ServeOptions, "serve"))

    status = commands.add_parser("status", help="print a KME's status for a peer, as JSON")
    describe(
        status,
        "Ask a KME how many keys it has for us and a peer, and for its limits (ETSI GS QKD 014, "
        "clause 5.1). No key is drawn.",
        examples=[
            "kme status --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem \\\n"
            "      --kme-key a.key --sae sae-a --peer-sae sae-b",
        ],
    )
    _add_access(status)
    status.set_defaults(action=_action(StatusOptions, "status"))

    pool = commands.add_parser(
        "export-pool",
        help="draw keys from a KME into a pool file",
    )
    describe(
        pool,
        "As the master (the default), draw --number keys for the peer into a pool file and write "
        "their IDs to --ids. As the slave, collect the keys whose IDs the peer wrote. Run it in "
        "both roles at both sites. Other commands use the pool with --key-pool, for example where "
        "no KME can be reached.",
        examples=[
            "kme export-pool --key-pool a.pool --pool-key a.pool.key --ids ids \\\n"
            "      --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem \\\n"
            "      --kme-key a.key --sae sae-a --peer-sae sae-b",
        ],
    )
    _add_access(pool)
    pool.add_argument(
        "--key-pool", type=file_path, required=True, metavar="FILE", help="the pool file"
    )
    pool.add_argument(
        "--pool-key",
        type=file_path,
        required=True,
        metavar="FILE",
        help="the key file that encrypts it; created if missing",
    )
    pool.add_argument(
        "--ids",
        type=file_path,
        required=True,
        metavar="FILE",
        help="key IDs: the master writes them, the slave reads them",
    )
    pool.add_argument(
        "--number", type=whole_number, default=100, metavar="N", help="keys to draw (default: 100)"
    )
    pool.add_argument(
        "--role",
        choices=("master", "slave"),
        default="master",
        help="master: draw new keys; slave: collect the keys of --ids (default: %(default)s)",
    )
    pool.set_defaults(action=_action(ExportPoolOptions, "export_pool"))

    dev_up = commands.add_parser(
        "dev-up", help="make certificates and configuration for two sites, and run both KMEs"
    )
    describe(
        dev_up,
        "Make certificates, keys and configuration for two sites, and run both their KMEs. The "
        "commands for 'listen' and 'connect' that use them are printed.",
        examples=["kme dev-up sites", "kme dev-up sites --producer link --distance 80"],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
        notes="For tests and first steps: both sites' keys are on one machine. See docs/kme.md.",
    )
    dev_up.add_argument(
        "folder", type=folder_path, metavar="DIR", help="the folder to write to; created if missing"
    )
    dev_up.add_argument(
        "--ports",
        default="8443,8444",
        metavar="A,B",
        help="the two KMEs' ports; 0 picks free ones (default: %(default)s)",
    )
    dev_up.add_argument(
        "--tls",
        default="stdlib",
        choices=KME_TLS_KINDS,
        help="TLS between SAE and KME (default: %(default)s)",
    )
    dev_up.add_argument(
        "--producer",
        default="random",
        choices=PRODUCERS,
        help="what makes the keys: random numbers or a simulated QKD link (default: %(default)s)",
    )
    dev_up.add_argument(
        "--distance", type=number, metavar="KM", help="length of the QKD link's fibre (default: 50)"
    )
    dev_up.add_argument(
        "--metrics",
        type=_address,
        metavar="ADDR",
        help="serve Prometheus metrics at this HOST:PORT",
    )
    dev_up.add_argument("--no-serve", action="store_true", help="write the files and exit")
    add_log_options(dev_up, default="warning")
    dev_up.set_defaults(action=_action(DevUpOptions, "dev_up"))


def _action(options: type, function: str) -> Action:
    return Action("kme", options, extra="kme", function=function)


def _address(text: str) -> TcpAddress:
    try:
        return parse_tcp_address(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_access(parser: argparse.ArgumentParser) -> None:
    """The options for the KME and our identity at it; the same as those of ``connect``."""
    add_kme_options(parser, required=True)
    parser.add_argument("--sae", required=True, metavar="ID", help="our own SAE ID")
    parser.add_argument("--peer-sae", required=True, metavar="ID", help="the peer's SAE ID")
