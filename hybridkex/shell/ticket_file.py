"""A ticket store in a file, which persists after the process ends."""

import base64
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Lock
from typing import Any, Final
from weakref import WeakSet

from hybridkex.crypto.suites import ALL_SUITES
from hybridkex.errors import ConfigError
from hybridkex.fields import checked_clock
from hybridkex.files import read_utf8, write_file
from hybridkex.json_text import load_json
from hybridkex.machine import write_error
from hybridkex.secret import Secret
from hybridkex.text import get_logger
from hybridkex.tls.session import AuthenticatedBy, SessionTicket

LOG: Final = get_logger(__name__)

_KEPT: Final = 4
"""Tickets per server."""
_MOST: Final = 4 << 20
"""The maximum length of the file in bytes. A server decides how long its tickets and its chain are,
up to about 1 MB, and :func:`~hybridkex.files.read_utf8` refuses a file of more than 16 MiB."""


_STORES: Final[WeakSet[Any]] = WeakSet()
"""All stores, for the child process of a fork."""


class FileTicketStore:
    """Tickets per server, as JSON in a file that only its owner can read: the newest four per
    server, for as many recent servers as fit in 4 MiB.

    The engine works on the copy in memory; :meth:`flush`, which the shells call in a worker thread,
    writes the file. A ticket is removed from the file before the ClientHello with it is sent, so it
    is not used twice even if the process ends at any moment. New tickets that cannot be written are
    a warning in the log, once until the file can be written again.

    Args:
        path: the file, which is read now; it need not exist, but its folder must.
        clock: seconds since the epoch.

    Raises:
        ConfigError: the file cannot be read, is not a ticket store, or its folder does not exist.
    """

    def __init__(self, path: str | Path, *, clock: Callable[[], float] = time.time) -> None:
        self._path = Path(path)
        self._clock = checked_clock(clock)
        self._make_locks()
        self._changed = False
        self._taken = False
        """Whether the file may have a ticket that was taken."""
        self._warned = False
        self._tickets = self._load()
        self._sizes = {server: _size(server, kept) for server, kept in self._tickets.items()}

    def _make_locks(self) -> None:
        """Locks for the loops, in several threads, that may share the store."""
        self._flushing, self._changing = Lock(), Lock()
        _STORES.add(self)

    def put(self, server: str, ticket: SessionTicket) -> None:
        """Store a ticket; the oldest are dropped to make room."""
        with self._changing:
            kept = [*self._tickets.get(server, []), _to_json(ticket)][-_KEPT:]
            self._change(server, kept)

    def take(self, server: str, binding: bytes | None = None) -> SessionTicket | None:
        """Remove and return the newest usable ticket with this binding."""
        with self._changing:
            return self._take(server, binding)

    def _take(self, server: str, binding: bytes | None) -> SessionTicket | None:
        kept, fitting = [], []
        for fields in self._tickets.get(server, []):
            try:
                ticket = _from_json(fields)
            except (KeyError, ValueError, TypeError):
                continue  # Written by another version, or by hand.
            if ticket.usable(self._clock()):
                kept.append(fields)
                if binding in (None, ticket.binding):
                    fitting.append((fields, ticket))
        if fitting:
            kept.remove(fitting[-1][0])
        self._change(server, kept)
        self._taken |= bool(fitting)  # last: a thread may be writing the previous table
        return fitting[-1][1] if fitting else None

    def _load(self) -> dict[str, list[Any]]:
        try:
            os.stat(self._path.parent)
        except FileNotFoundError as error:
            raise write_error(self._path, error) from None
        except (OSError, ValueError):
            pass  # the reader reports the cause
        try:
            text = read_utf8(self._path, missing=b"{}", own=True)
            tickets = load_json(text, most_values=None)
        except ConfigError:
            raise
        except ValueError:
            tickets = None
        if not isinstance(tickets, dict) or not all(
            isinstance(kept, list) for kept in tickets.values()
        ):
            raise ConfigError(f"{self._path} is not a ticket store")
        return tickets

    def flush(self) -> None:
        """Write the file, if anything has changed.

        Raises:
            ConfigError: it cannot be written, and may have a ticket that was taken.
        """
        with self._flushing:  # two threads must not write out of order
            self._write()

    def _change(self, server: str, kept: list[Any]) -> None:
        """Replace the table, since a thread may be writing the present one; the newest entry is
        last."""
        tickets = {name: old for name, old in self._tickets.items() if name != server}
        self._sizes.pop(server, None)
        if kept:
            tickets[server] = kept
            self._sizes[server] = _size(server, kept)
        room = _MOST - sum(self._sizes.values())
        while room < 0:
            oldest = next(iter(tickets))
            del tickets[oldest]
            room += self._sizes.pop(oldest)
        self._tickets = tickets
        self._changed = True

    def _write(self) -> None:
        if not self._changed:
            return
        taken, self._taken, self._changed = self._taken, False, False
        content = json.dumps(self._tickets).encode("ascii")
        try:
            try:
                write_file(self._path, content)
            except OSError:
                if not taken or not self._path.is_file():
                    raise
                self._path.unlink()  # then a full disk has room for the new file
                taken = False
                write_file(self._path, content)
        except OSError as error:
            self._changed = True
            reason = write_error(self._path, error)
            if taken:
                self._taken = True
                raise reason from None
            if not self._warned:
                LOG.warning("new session tickets are not stored: %s", reason)
            self._warned = True
        else:
            self._warned = False


def _forget_locks() -> None:
    """A forked child has none of the threads that may have held the locks."""
    for store in list(_STORES):
        store._make_locks()


os.register_at_fork(after_in_child=_forget_locks)


def _size(server: str, kept: list[Any]) -> int:
    return len(json.dumps({server: kept}))


def _to_json(ticket: SessionTicket) -> dict[str, Any]:
    return {
        "ticket": _text(ticket.ticket),
        "psk": _text(ticket.psk.reveal()),
        "suite": ticket.suite.name,
        "age_add": ticket.age_add,
        "lifetime": ticket.lifetime,
        "received_at": ticket.received_at,
        "server_name": ticket.server_name,
        "chain": [_text(der) for der in ticket.chain],
        "certificate_type": ticket.certificate_type,
        "authenticated_by": ticket.authenticated_by.value,
        "psk_identity": _text(ticket.psk_identity) if ticket.psk_identity is not None else None,
        "psk_context": _text(ticket.psk_context) if ticket.psk_context is not None else None,
        "began_at": ticket.began_at,
        "binding": _text(ticket.binding),
    }


def _from_json(fields: dict[str, Any]) -> SessionTicket:
    """Raises ``KeyError``, ``TypeError`` or ``ValueError`` if it is not a ticket of ours."""
    suite = {suite.name: suite for suite in ALL_SUITES}[fields["suite"]]
    psk, ticket = _bytes(fields["psk"]), _bytes(fields["ticket"])
    if len(psk) != suite.hash.size or not ticket:
        raise ValueError("no ticket, or a PSK of another length")
    chain = fields["chain"]
    if type(chain) is not list:
        raise ValueError("no list of certificates")
    identity, context = fields["psk_identity"], fields["psk_context"]
    name = fields["server_name"]
    return SessionTicket(
        ticket=ticket,
        psk=Secret(psk),
        suite=suite,
        age_add=_integer(fields["age_add"]),
        lifetime=_integer(fields["lifetime"]),
        received_at=_seconds(fields["received_at"]),
        server_name=_string(name) if name is not None else None,
        chain=tuple(_bytes(der) for der in chain),
        certificate_type=_integer(fields["certificate_type"]),
        authenticated_by=AuthenticatedBy(fields["authenticated_by"]),
        psk_identity=_bytes(identity) if identity is not None else None,
        psk_context=_bytes(context) if context is not None else None,
        began_at=_seconds(fields["began_at"]),
        binding=_bytes(fields["binding"]),
    )


def _integer(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 32:
        raise ValueError("not a 32-bit number")
    return value


def _seconds(value: Any) -> float:
    # Python's JSON has Infinity and NaN; a whole number may be too large for a float.
    if type(value) not in (int, float) or not 0 <= value < 1 << 53:
        raise ValueError("not a time")
    return float(value)


def _string(value: Any) -> str:
    if type(value) is not str:
        raise ValueError("not a string")
    return value


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _bytes(text: Any) -> bytes:
    return base64.b64decode(_string(text), validate=True)
