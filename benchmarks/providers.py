"""ML-KEM of `cryptography` beside liboqs: its operations, and whole handshakes in memory."""

import time
from collections.abc import Callable, Iterator
from functools import partial

from benchmarks.engines import Pair
from benchmarks.results import Options, Row, in_turns
from hybridkex import (
    MLKEM768,
    MLKEM1024,
    X25519MLKEM768,
    ClientConfig,
    Group,
    Pins,
    RawIdentity,
    ServerConfig,
)
from hybridkex.crypto.kex_oqs import via_oqs
from hybridkex.errors import ProviderMissing

__all__ = ["run"]


def timed(action: Callable[[], object], times: int) -> float:
    """Measure the CPU microseconds of one call."""
    start = time.process_time()
    for _ in range(times):
        action()
    return (time.process_time() - start) / times * 1e6


def operations(group: Group) -> dict[str, Callable[[], object]]:
    """Key generation, encapsulation and decapsulation."""
    exchange = group.exchange
    started = exchange.start()
    answer, _ = exchange.respond(started.share)
    return {
        "key pair": exchange.start,
        "encapsulation": lambda: exchange.respond(started.share),
        "decapsulation": lambda: started.finish(answer),
    }


def handshake(group: Group) -> Callable[[], object]:
    """A whole handshake, both sides, with Ed25519 raw public keys."""
    identity = RawIdentity.generate()
    client = ClientConfig(verifier=Pins(frozenset({identity.pin})), groups=(group,))
    server = ServerConfig(identities=(identity,), groups=(group,))
    return lambda: Pair(client, server, None).handshake()


def run(options: Options) -> Iterator[Row]:
    """Measure."""
    providers: dict[str, Callable[[Group], Group]] = {"cryptography": lambda group: group}
    try:
        via_oqs(MLKEM768)
        providers["liboqs"] = via_oqs
    except ProviderMissing as missing:
        print(f"liboqs is missing, and its figures are left out: {missing}")
    works = {
        f"{group} {name}": {
            tool: operations(provider(group))[name] for tool, provider in providers.items()
        }
        for group in (MLKEM768, MLKEM1024)
        for name in ("key pair", "encapsulation", "decapsulation")
    }
    whole = {tool: handshake(provider(X25519MLKEM768)) for tool, provider in providers.items()}
    works["X25519MLKEM768 handshake, both sides"] = whole
    times = options.size(100, 2)
    for name, tools in works.items():
        taken = {tool: partial(timed, action, times) for tool, action in tools.items()}
        yield Row(name, "us", in_turns(options.rounds, taken))
