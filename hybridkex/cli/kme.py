"""``hybridkex kme``: run a KME, ask one, fill key pools, set up two sites to try.

``docs/kme.md`` shows the configuration file and the whole way.
"""

import argparse
import math
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import trio

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli.key_sources import add_kme_options, kme_access
from hybridkex.cli.logs import add_log_options, set_up_logging
from hybridkex.cli.manual import describe
from hybridkex.cli.running import run_trio
from hybridkex.cli.values import file_path, folder_path
from hybridkex.errors import ConfigError, HybridkexError
from hybridkex.files import PUBLIC, write_file
from hybridkex.json_text import load_json
from hybridkex.kme.config import PRODUCERS, load_config
from hybridkex.kme.serve import KmeServer, Serving
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.etsi014.mutual_tls import TLS_KINDS
from hybridkex.qkd.etsi014.pool_filling import (
    collect_into_pool,
    draw_into_pool,
    pool_names,
)
from hybridkex.qkd.pool import FilePool
from hybridkex.qkd.source import canonical_key_id
from hybridkex.qkd.store import write_key_file
from hybridkex.text import get_logger, json_line

__all__ = ["configure", "run"]

LOG: Final = get_logger(__name__)

SITES: Final = (("kme-a", "alice"), ("kme-b", "bob"))
"""KME ID and SAE ID of the two sites of ``dev-up``."""


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the sub-commands."""
    describe(
        parser,
        "A key management entity hands the keys of a QKD link to the applications (SAEs) of its "
        "site over mutual TLS, as ETSI GS QKD 014 has it.",
        examples=["kme dev-up sites", "kme serve kme.toml"],
        notes="See docs/kme.md.",
    )
    commands = parser.add_subparsers(metavar="command", required=True)

    serve = commands.add_parser("serve", help="run the KMEs of a configuration file")
    describe(
        serve,
        "Run the KMEs of a configuration file until a signal ends them. SIGHUP reads the file and "
        "the certificates again; a file that cannot be used changes nothing.",
        examples=["kme serve kme.toml", "kme serve kme.toml --log-level info"],
        status="0 after SIGTERM or SIGINT, 1 when it cannot start",
        notes="See docs/kme.md.",
    )
    serve.add_argument(
        "config", type=file_path, metavar="FILE", help="a TOML file, see docs/kme.md"
    )
    add_log_options(serve, default="warning")
    serve.set_defaults(action=_serve)

    status = commands.add_parser("status", help="print a KME's status for a peer, as JSON")
    describe(
        status,
        "Ask a KME how many keys it has for us and a peer, and what it allows (ETSI GS QKD 014, "
        "section 5.1). No key is drawn.",
        examples=[
            "kme status --kme https://localhost:8443 --kme-ca ca.pem --kme-cert a.pem \\\n"
            "      --kme-key a.key --sae sae-a --peer-sae sae-b",
        ],
    )
    _add_access(status)
    status.set_defaults(action=_status)

    pool = commands.add_parser(
        "export-pool",
        help="draw keys from a KME into a pool file",
    )
    describe(
        pool,
        "As the master (the default), draw --number keys for the peer into a pool file and write "
        "their IDs to --ids. As the slave, collect the keys whose IDs the peer wrote. Run it in "
        "both roles at both sites. --key-pool of the other commands uses the pool where the KME "
        "cannot be reached.",
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
        help="its key file; made if missing",
    )
    pool.add_argument(
        "--ids",
        type=file_path,
        required=True,
        metavar="FILE",
        help="key IDs: the master writes them, the slave reads them",
    )
    pool.add_argument(
        "--number", type=int, default=100, metavar="N", help="keys to draw (default 100)"
    )
    pool.add_argument(
        "--role",
        choices=("master", "slave"),
        default="master",
        help="master: draw new keys; slave: collect the keys of --ids (default: %(default)s)",
    )
    pool.set_defaults(action=_export_pool)

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
    dev_up.add_argument("folder", type=folder_path, metavar="DIR", help="a new or empty folder")
    dev_up.add_argument(
        "--ports",
        default="8443,8444",
        metavar="A,B",
        help="of the KMEs; 0 picks (default: %(default)s)",
    )
    dev_up.add_argument(
        "--tls",
        default="stdlib",
        choices=TLS_KINDS,
        help="on the hop to the KME (default: %(default)s)",
    )
    dev_up.add_argument(
        "--producer",
        default="random",
        choices=PRODUCERS,
        help="of keys: random, or a QKD link (default: %(default)s)",
    )
    dev_up.add_argument(
        "--distance", type=float, metavar="KM", help="of the QKD link's fibre (default 50)"
    )
    dev_up.add_argument(
        "--metrics",
        type=_address,
        metavar="ADDR",
        help="serve Prometheus metrics at this HOST:PORT",
    )
    dev_up.add_argument("--no-serve", action="store_true", help="only write the files")
    add_log_options(dev_up, default="warning")
    dev_up.set_defaults(action=_dev_up)


def run(args: argparse.Namespace) -> int:
    """Run the sub-command that was chosen."""
    action: Callable[[argparse.Namespace], int] = args.action
    return action(args)


def _address(text: str) -> TcpAddress:
    try:
        return parse_tcp_address(text)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _add_access(parser: argparse.ArgumentParser) -> None:
    """The options that say which KME, and who we are to it; the same as those of ``connect``."""
    add_kme_options(parser, required=True)
    parser.add_argument("--sae", required=True, metavar="ID", help="our own SAE ID")
    parser.add_argument("--peer-sae", required=True, metavar="ID", help="the peer's SAE ID")


# -- serve


def _serve(args: argparse.Namespace) -> int:
    return _run_server(args.config, args.log_level, _print_where)


def _print_where(where: Serving) -> None:
    for kme_id, address in where.kmes.items():
        print(f"{kme_id} listens on https://{address}", flush=True)
    if where.metrics is not None:
        print(f"metrics on http://{where.metrics}/metrics", flush=True)


def _run_server(path: Path, log_level: str, announce: Callable[[Serving], None]) -> int:
    set_up_logging(log_level)
    server = KmeServer(load_config(path))

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(*_SIGNALS) as signals:
                nursery.start_soon(_obey, signals, server, path)
                try:
                    # Not in the nursery: an error shall come out as it is, not in a group.
                    await server.serve(task_status=_Announced(announce))
                finally:
                    nursery.cancel_scope.cancel()

    run_trio(main)
    return 0


_SIGNALS: Final = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


class _Announced:
    """A task status that hands the started value to a function."""

    def __init__(self, announce: Callable[[Serving], None]) -> None:
        self._announce = announce

    def started(self, value: Any = None) -> None:
        self._announce(value)


async def _obey(signals: Any, server: KmeServer, path: Path) -> None:
    async for number in signals:
        if number == signal.SIGHUP:
            _reload(server, path)
        else:
            server.close()


def _reload(server: KmeServer, path: Path) -> None:
    try:
        server.reload(load_config(path))
    except HybridkexError as error:
        LOG.error("not reloaded, the old configuration stays: %s", error)  # noqa: TRY400
    except Exception as error:
        # Of a file that is odd in a way that nobody foresaw: it must not end the KME.
        LOG.error("not reloaded, the old configuration stays: %s", type(error).__name__)  # noqa: TRY400
        LOG.debug("the internal error", exc_info=error)
    else:
        LOG.warning("reloaded")


# -- status


def _status(args: argparse.Namespace) -> int:
    async def main() -> None:
        async with KmeClient(kme_access(args)) as client:
            status = await client.status(args.peer_sae)
        print(json_line(status.to_json(), indent=2))

    run_trio(main)
    return 0


# -- export-pool


def _export_pool(args: argparse.Namespace) -> int:
    if not args.pool_key.exists():
        write_key_file(args.pool_key)
    master = args.role == "master"
    ids = [] if master else _read_ids(args.ids)
    if args.number < 1:
        raise ConfigError("--number must be positive")
    if master and args.ids.exists():
        raise ConfigError(
            f"{args.ids} is there already; name another file, or collect its keys with --role slave"
        )

    def announce(drawn: Sequence[str]) -> None:
        write_file(args.ids, (json_line(list(drawn)) + "\n").encode("ascii"))

    async def main() -> None:
        async with KmeClient(kme_access(args)) as client:
            names = await pool_names(client, sae=args.sae, peer_sae=args.peer_sae)
            async with FilePool.open(args.key_pool, key_file=args.pool_key, names=names) as pool:
                if master:
                    await draw_into_pool(pool, client, args.number, announce=announce)
                else:
                    await collect_into_pool(pool, client, ids)
        moved = args.number if master else len(ids)
        print(json_line({"pool": str(args.key_pool), "keys": moved}))

    run_trio(main)
    return 0


def _read_ids(path: Path) -> list[str]:
    try:
        found = load_json(path.read_text(encoding="ascii"))
        return [canonical_key_id(item) for item in found]
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not a list of key IDs") from None


# -- dev-up

_DEV_CONFIG: Final = """\
# Two KMEs of one link in one process, for a first try. See docs/kme.md for every setting.
"""

_DEV_KME: Final = """
[[kme]]
id = "{kme}"
listen = "127.0.0.1:{port}"
saes = ["{sae}"]
ca = "{kme}/ca.pem"
certificate = "{kme}/cert.pem"
key = "{kme}/key.pem"
store = "{kme}/keys.db"
key_file = "{kme}/store.key"
tls = "{tls}"

[[kme.peer]]
id = "{peer_kme}"
saes = ["{peer_sae}"]
producer = "{producer}"
"""


def _dev_up(args: argparse.Namespace) -> int:
    ports = [parse_tcp_address(f"127.0.0.1:{port}").port for port in args.ports.split(",")]
    if len(ports) != len(SITES):
        raise ConfigError("--ports takes two ports")
    config: Path = args.folder / "kme.toml"
    if config.exists():
        raise ConfigError(f"{config} is there already; run: hybridkex kme serve {config}")
    if args.distance is not None and args.producer != "link":
        raise ConfigError("--distance goes with --producer link")
    if args.distance is not None and not 0 <= args.distance < math.inf:
        raise ConfigError("--distance is in km, and not negative")
    ca = DevCa.create("hybridkex development KME CA")
    text = _DEV_CONFIG
    if args.metrics is not None:
        text += f'metrics = "{args.metrics}"\n'
    for index, (kme, sae) in enumerate(SITES):
        for holder in (kme, sae):
            identity = ca.issue("127.0.0.1", "localhost", common_name=holder)
            write_identity(args.folder / holder, ca, identity)
        write_key_file(args.folder / kme / "store.key")
        peer_kme, peer_sae = SITES[1 - index]
        text += _DEV_KME.format(
            kme=kme,
            sae=sae,
            port=ports[index],
            tls=args.tls,
            peer_kme=peer_kme,
            peer_sae=peer_sae,
            producer=args.producer,
        )
        if args.distance is not None:
            text += f"link = {{ distance_km = {args.distance} }}\n"
    write_file(config, text.encode("utf-8"), mode=PUBLIC)
    if args.no_serve:
        print(config)
        return 0

    def announce(where: Serving) -> None:
        _print_where(where)
        print("\nTry, in two other terminals:\n")
        alice, bob = (
            _channel_options(args.folder, where.kmes[kme], sae, args.tls) for kme, sae in SITES
        )
        print(f"  hybridkex listen 4433 --bind 127.0.0.1 {bob} --peer-sae alice\n")
        print(f"  hybridkex connect 127.0.0.1 4433 {alice} --peer-sae bob\n", flush=True)

    return _run_server(config, args.log_level, announce)


def _channel_options(folder: Path, address: TcpAddress, sae: str, tls: str) -> str:
    files = folder / sae
    hop = "" if tls == "stdlib" else f" --kme-tls {tls}"
    return (
        f"--kme https://{address} --kme-ca {files / 'ca.pem'} --kme-cert {files / 'cert.pem'}"
        f" --kme-key {files / 'key.pem'} --sae {sae}{hop}"
    )
