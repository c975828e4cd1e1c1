"""``hybridkex kme``: run a KME, move its keys, query one, fill key pools, set up two test sites.

``docs/kme.md`` describes the configuration file and each step.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from hybridkex.apps.systemd import notify, notify_reloading, obey, open_signals
from hybridkex.auth.dev_ca import DevCa, identity_files
from hybridkex.cli.key_sources import kme_access
from hybridkex.cli.kme import (
    DevUpOptions,
    ExportPoolOptions,
    MigrateOptions,
    ServeOptions,
    StatusOptions,
    VerifyAuditOptions,
)
from hybridkex.cli.logs import set_up_logging
from hybridkex.cli.running import EndRequest, run_service, run_trio
from hybridkex.errors import (
    ConfigError,
    HybridkexError,
    KeySourceError,
    KeySourceUnavailable,
)
from hybridkex.files import PRIVATE, PUBLIC, read_utf8, write_file, write_files
from hybridkex.json_text import load_json
from hybridkex.kme.audit import verify
from hybridkex.kme.config import KmeConfig, PostgresUrl, ServeConfig, load_config
from hybridkex.kme.serve import KmeServer, Serving, check_config
from hybridkex.machine import write_error
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.descriptors import raise_soft_limit
from hybridkex.qkd.etsi014.client import KmeClient
from hybridkex.qkd.etsi014.pool_filling import (
    collect_into_pool,
    draw_into_pool,
    pool_names,
)
from hybridkex.qkd.pool import FilePool
from hybridkex.qkd.source import canonical_key_id
from hybridkex.qkd.store import new_key_file, read_key_file, write_key_file
from hybridkex.text import get_logger, json_line

LOG: Final = get_logger("hybridkex.cli.kme")

SITES: Final = (("kme-a", "alice"), ("kme-b", "bob"))
"""KME ID and SAE ID of the two sites of ``dev-up``."""


# -- serve


def serve(options: ServeOptions) -> int:
    set_up_logging(options.log_level, options.log_format)

    def load() -> ServeConfig:
        config = load_config(options.config)
        return config if options.metrics is None else replace(config, metrics=options.metrics)

    if options.check:
        run_trio(partial(check_config, load()))
        print(f"{options.config} can be served")
        return 0
    return _run_server(load, _print_where)


def _print_where(where: Serving) -> None:
    for kme_id, address in where.kmes.items():
        print(f"{kme_id} listens on https://{address}", flush=True)
    if where.metrics is not None:
        print(f"metrics on http://{where.metrics}/metrics", flush=True)


def _run_server(load: Callable[[], ServeConfig], announce: Callable[[Serving], None]) -> int:
    raise_soft_limit()
    server = KmeServer(load())

    async def main(request: EndRequest) -> None:
        def end(number: int) -> None:
            request.note(number)
            notify("STOPPING=1")
            server.close()

        async def reload() -> None:
            await announced.event.wait()
            await _reload(server, load)

        announced = _Announced(announce)
        with open_signals() as signals:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(obey, signals, reload, end)
                try:
                    # Not in the nursery: an error must not be wrapped in an exception group.
                    await server.serve(task_status=announced)
                finally:
                    nursery.cancel_scope.cancel()

    run_service(main)
    return 0


class _Announced:
    """A task status that passes the started value to a function."""

    def __init__(self, announce: Callable[[Serving], None]) -> None:
        self._announce = announce
        self.event: Final = trio.Event()

    def started(self, value: Any = None) -> None:
        self.event.set()
        self._announce(value)
        notify("READY=1")


async def _reload(server: KmeServer, load: Callable[[], ServeConfig]) -> None:
    notify_reloading()
    try:
        await server.reload(load)
    except HybridkexError as error:
        LOG.error("not reloaded, the old configuration stays: %s", error)  # noqa: TRY400
    except Exception as error:
        # An unforeseen fault of a file must not end the KME.
        LOG.error("not reloaded, the old configuration stays: %s", type(error).__name__)  # noqa: TRY400
        LOG.debug("the internal error", exc_info=error)
    else:
        LOG.warning("reloaded")
    notify("READY=1")


# -- migrate


def migrate(options: MigrateOptions) -> int:
    from hybridkex.qkd.store_move import move  # noqa: PLC0415  # an extra

    config = _chosen(load_config(options.config).kme, options)
    if not isinstance(config.store, PostgresUrl):
        raise ConfigError(
            f"the store of {config.id} in {options.config} is not a database: set store = "
            '"postgresql://..." first'
        )
    moved = move(
        options.source,
        config.store.url,
        read_key_file(config.key_file),
        read_keys=[read_key_file(path) for path in config.read_key_files],
        owner=config.id,
        links=[config.id, *(peer.id for peer in config.peer)],
    )
    if moved is None:
        print(f"the keys of {options.source} were moved before: nothing to do")
    else:
        print(
            f"{config.id}: {moved.rows['material']} keys and {moved.rows['grants']} promised or "
            f"delivered ones of {options.source} are in {moved.where}"
        )
    return 0


def _chosen(kmes: Sequence[KmeConfig], options: MigrateOptions) -> KmeConfig:
    found = [one for one in kmes if options.kme in (None, one.id)]
    if len(found) != 1:
        known = ", ".join(one.id for one in kmes)
        raise ConfigError(f"name one KME of {options.config} with --kme: {known}")
    return found[0]


# -- verify-audit


def verify_audit(options: VerifyAuditOptions) -> int:
    found = verify(options.folders, options.head)
    for name, head in found.heads.items():
        print(f"{head or '(no record)':<64}  {name}")
    for problem in found.problems:
        print(problem)
    state = "NOT whole" if found.problems else "whole"
    files = "1 file" if len(found.heads) == 1 else f"{len(found.heads)} files"
    records = "1 record" if found.records == 1 else f"{found.records} records"
    print(f"{files}, {records}: the trail is {state}")
    return 1 if found.problems else 0


# -- status


def status(options: StatusOptions) -> int:
    async def main() -> None:
        async with KmeClient(kme_access(options.access)) as client:
            found = await client.status(options.peer_sae)
        print(json_line(found.to_json(), indent=2))

    run_trio(main)
    return 0


# -- export-pool


def export_pool(options: ExportPoolOptions) -> int:
    if not options.pool_key.exists():
        write_key_file(options.pool_key)
    master = options.role == "master"
    ids = [] if master else _read_ids(options.ids)
    if options.number < 1:
        raise ConfigError("--number must be positive")
    if master and options.ids.exists():
        raise ConfigError(
            f"{options.ids} exists already; name another file, or collect its keys with --role "
            "slave"
        )

    refused: dict[str, KeySourceError] = {}

    def announce(drawn: Sequence[str]) -> None:
        write_file(options.ids, (json_line(list(drawn)) + "\n").encode("ascii"))

    async def main() -> None:
        async with KmeClient(kme_access(options.access)) as client:
            names = await pool_names(client, sae=options.sae, peer_sae=options.peer_sae)
            async with FilePool.open(
                options.key_pool, key_file=options.pool_key, names=names
            ) as pool:
                if master:
                    await draw_into_pool(pool, client, options.number, announce=announce)
                else:
                    refused.update(await collect_into_pool(pool, client, ids))
        moved = options.number if master else len(ids) - len(refused)
        print(json_line({"pool": str(options.key_pool), "keys": moved}))
        if refused:
            raise KeySourceUnavailable(
                f"{len(refused)} of {len(ids)} keys are not in the pool: "
                f"{next(iter(refused.values()))}. If an earlier attempt failed after the KME had "
                "delivered them, they are lost; the peer's pool has them, and a connection with "
                "one of them fails"
            )

    run_trio(main)
    return 0


def _read_ids(path: Path) -> list[str]:
    text = read_utf8(path)
    try:
        found = load_json(text, most_values=None)
        return [canonical_key_id(item) for item in found]
    except (ValueError, TypeError, AttributeError):
        raise ConfigError(f"{path} is not a list of key IDs") from None


# -- dev-up

_DEV_CONFIG: Final = """\
# Two KMEs of one link in one process, for a first try. See docs/kme.md for every setting.
"""

_DEV_STOCK: Final = 1000
"""Keys of a simulated link, which uses the processor until its KMEs are full."""

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


def dev_up(options: DevUpOptions) -> int:
    ports = [parse_tcp_address(f"127.0.0.1:{port}").port for port in options.ports.split(",")]
    if len(ports) != len(SITES):
        raise ConfigError("--ports takes two port numbers")
    config: Path = options.folder / "kme.toml"
    if config.exists():
        raise ConfigError(f"{config} exists already; run: hybridkex kme serve {config}")
    for name in (name for site in SITES for name in site):
        if (options.folder / name).exists():
            raise ConfigError(
                f"{options.folder / name} exists already and is not replaced: choose a new folder"
            )
    if options.distance is not None and options.producer != "link":
        raise ConfigError("--distance requires --producer link")
    try:
        write_files(_dev_files(options, config, ports))
    except OSError as error:
        raise write_error(error.filename or options.folder, error) from None
    if options.no_serve:
        print(config)
        return 0

    def announce(where: Serving) -> None:
        _print_where(where)
        print("\nTry, in two other terminals:\n")
        alice, bob = (
            _channel_options(options.folder, where.kmes[kme], sae, options.tls)
            for kme, sae in SITES
        )
        print(f"  hybridkex listen 4433 --bind 127.0.0.1 {bob} --peer-sae alice\n")
        print(f"  hybridkex connect 127.0.0.1 4433 {alice} --peer-sae bob\n", flush=True)

    set_up_logging(options.log_level)
    return _run_server(partial(load_config, config), announce)


def _dev_files(
    options: DevUpOptions, config: Path, ports: list[int]
) -> dict[Path, tuple[bytes, int]]:
    """The files of both sites, each with its mode: certificates, keys and the configuration."""
    ca = DevCa.create("hybridkex development KME CA")
    files: dict[Path, tuple[bytes, int]] = {}
    text = _DEV_CONFIG
    if options.metrics is not None:
        text += f'metrics = "{options.metrics}"\n'
    for index, (kme, sae) in enumerate(SITES):
        for holder in (kme, sae):
            identity = ca.issue("127.0.0.1", "localhost", common_name=holder)
            files |= identity_files(options.folder / holder, ca, identity)
        files[options.folder / kme / "store.key"] = new_key_file(), PRIVATE
        peer_kme, peer_sae = SITES[1 - index]
        text += _DEV_KME.format(
            kme=kme,
            sae=sae,
            port=ports[index],
            tls=options.tls,
            peer_kme=peer_kme,
            peer_sae=peer_sae,
            producer=options.producer,
        )
        if options.distance is not None:
            text += f"link = {{ distance_km = {options.distance} }}\n"
        if options.producer == "link":
            text += f"[kme.limits]\nmax_key_count = {_DEV_STOCK}\n"
    files[config] = text.encode("utf-8"), PUBLIC
    return files


def _channel_options(folder: Path, address: TcpAddress, sae: str, tls: str) -> str:
    files = folder / sae
    tls_option = "" if tls == "stdlib" else f" --kme-tls {tls}"
    return (
        f"--kme https://{address} --kme-ca {files / 'ca.pem'} --kme-cert {files / 'cert.pem'}"
        f" --kme-key {files / 'key.pem'} --sae {sae}{tls_option}"
    )
