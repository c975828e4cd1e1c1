"""Warnings about a certificate of our own that expires while a command runs."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import trio
from cryptography import x509

from hybridkex.shell.expiry_watch import ExpiryWatch
from hybridkex.text import get_logger

LOG: Final = get_logger("hybridkex.cli.own_certificate")


@contextmanager
def watched(path: Path | None, certificate: x509.Certificate | None) -> Iterator[None]:
    """In this context, log once when our certificate expires soon, and once when it has expired; at
    the start if that is so already.

    Args:
        path: where it comes from.
        certificate: ``None`` if there is none, such as with a raw key.
    """
    if certificate is None:
        yield
        return
    watch = ExpiryWatch(lambda text: LOG.warning("%s", text))
    watch.watch_own(path, certificate)
    scope = trio.CancelScope()

    async def check_regularly() -> None:
        with scope:
            while True:
                seconds = watch.check()
                await trio.sleep(seconds)

    # Not in a nursery: an error in the context must not be wrapped in an exception group.
    trio.lowlevel.spawn_system_task(check_regularly)
    try:
        yield
    finally:
        scope.cancel()
