"""The secure transport: the engine between an asyncio transport and the application's protocol.

The application uses :class:`SecureTransport` to write, pause and close. Its parts do the work
(:mod:`hybridkex.aio.channel`); one of them, ``receiver``, is the protocol of the transport below.

- The application's ``connection_made`` is called when the handshake is complete, as with asyncio's
  own TLS.
- Received data is decrypted at once. While the application has paused reading, the decrypted data
  waits and the transport below is paused, so that no more than one read is held.
- Short writes are joined until the loop's next iteration, or until the end of the read that they
  answer.
- A long write is encrypted and sent in batches, one in each iteration of the loop. Other
  connections are served in between, and the rest waits as the application's own bytes object,
  without an encrypted copy.
- Once a callback has paused reading, closed the connection or replaced the protocol, the old
  protocol gets no more data, not even the rest of the record that is being delivered.
- An exception raised by the application's protocol, or by code of the configuration, ends its
  connection: the loop's exception handler and ``connection_lost`` get the exception, and the peer
  gets the alert internal_error. Until the handshake is complete, the caller that waits for it gets
  the exception instead of the loop's handler.
"""

import asyncio
from asyncio import constants, transports
from collections.abc import Iterable
from typing import Any, Final

from hybridkex.aio.channel import Handshake, Lifecycle
from hybridkex.aio.places import Places
from hybridkex.errors import LocalStateError
from hybridkex.secret import Secret
from hybridkex.shell.ssl_facade import SslObject, cipher_of, peercert_of
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.connection import connection_for
from hybridkex.tls.one_time_pad import PadBudget
from hybridkex.tls.session import Session

_HANDSHAKE_TIMEOUT: Final = 10.0
"""The default time limit of a handshake in seconds."""
_SHUTDOWN_TIMEOUT: Final = 30.0
"""Seconds from ``close`` until the peer's close_notify; asyncio's default."""


class SecureTransport(transports._FlowControlMixin):
    """A transport that encrypts over another transport.

    :func:`~hybridkex.aio.create_connection`, :func:`~hybridkex.aio.create_server` and
    :func:`~hybridkex.aio.start_tls` make it.

    ``get_extra_info`` supports ``hybridkex_session`` (the :class:`~hybridkex.Session`),
    ``peercert``, ``cipher``, ``ssl_object``, ``sslcontext`` (the configuration), and the names of
    the transport below (``peername``, ``sockname``, ``socket``).

    Args:
        protocol: the application's protocol.
        config: the configuration of a client or of a server.
        server_hostname: the name or address that the server's certificate must have (client).
        ssl_handshake_timeout: seconds for the handshake; 10 by default.
        ssl_shutdown_timeout: seconds from ``close`` until the peer's close_notify; 30 by default.
        call_connection_made: whether the protocol's ``connection_made`` is called.
        ready: a future that is done when the handshake is complete or has failed.
        places: those of the server that has accepted the connection.

    Raises:
        ConfigError: the configuration is neither a ``ClientConfig`` nor a ``ServerConfig``, or a
            server is given a ``server_hostname``.
        ValueError: a time limit is not positive.
    """

    # asyncio asks a transport for these names, and loop.sendfile for the base class too.
    _start_tls_compatible = True  # loop.start_tls, for a TLS connection inside this one
    _sendfile_compatible = constants._SendfileMode.FALLBACK

    _high_water: int
    _low_water: int

    def __init__(
        self,
        protocol: asyncio.BaseProtocol,
        config: ClientConfig | ServerConfig,
        *,
        server_hostname: str | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
        call_connection_made: bool = True,
        ready: "asyncio.Future[None] | None" = None,
        places: Places | None = None,
    ) -> None:
        transports.Transport.__init__(self)  # the mixin's own sets what the halves have
        handshake, shutdown = time_limits(ssl_handshake_timeout, ssl_shutdown_timeout)
        life = Lifecycle(
            self,
            connection_for(config, server_hostname),
            config,
            shutdown_timeout=shutdown,
            announced=not call_connection_made,
            ready=ready,
        )
        life.handshake = Handshake(life, handshake, places)
        life.register = None if places is None else places.register
        self._life: Final = life
        self.receiver: Final = life.reading
        self._writing: Final = life.writing
        self.set_protocol(protocol)
        self.set_write_buffer_limits()

    def __repr__(self) -> str:
        role = "server" if isinstance(self._life.config, ServerConfig) else "client"
        return f"<SecureTransport {role} {self._life.state.name.lower()} {self._life.raw!r}>"

    @property
    def session(self) -> Session:
        """The parameters of the session: groups, keys and the identity of the peer.

        Raises:
            LocalStateError: the handshake is not complete.
        """
        return self._life.engine.session

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """Exported keying material for an application protocol (RFC 9846 section 7.5).

        Args:
            label: the label of the application protocol, 1 to 249 bytes.
            context: the protocol's context; may be empty.
            length: the number of bytes, 1 to 12,240 with SHA-384 and to 8,160 with SHA-256.

        Raises:
            LocalStateError: the handshake is not complete, or the connection was closed.
            ConfigError: ``label`` or ``length`` is out of range.
        """
        return self._life.engine.export(label, context, length)

    def export_fresh(self, label: bytes, context: bytes, length: int) -> Secret:
        """Like :meth:`export`, from the current epoch's exporter secret, which each key update
        replaces (draft-ietf-tls-extended-key-update-13 section 10).

        ``label``, ``context`` and ``length`` are those of :meth:`export`.

        Raises:
            LocalStateError: the handshake is not complete, or Extended Key Update was not
                negotiated.
        """
        return self._life.engine.export_fresh(label, context, length)

    @property
    def pad(self) -> PadBudget | None:
        """The remaining one-time pads; ``None`` if none was negotiated.

        Raises:
            LocalStateError: the handshake is not complete.
        """
        pads = self._life.pads
        return self._life.engine.pad if pads is None else pads.budget

    def update_keys(self, *, request_peer: bool = False) -> None:
        """Change our sending key behind the data that was written, and ask the peer to change its
        key if ``request_peer`` (RFC 9846 section 4.7.3).

        If Extended Key Update was negotiated, this starts one at once, with a QKD key if the policy
        uses them; data that waits is sent under either epoch. When the update is complete,
        :attr:`session` has another epoch.

        Raises:
            LocalStateError: the handshake is not complete, or the sending direction is closed.
        """
        engine, renewer = self._life.engine, self._life.renewer
        if renewer is not None and renewer.extended:
            if engine.close_sent or self._writing.end_due:
                raise LocalStateError(
                    "a key update can start only after the handshake and before the connection is "
                    "closed"
                )
            renewer.update()
            return
        self._writing.update_keys(request_peer=request_peer)

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """Information about the connection, by ``name`` (see the class), or ``default``."""
        life = self._life
        if name == "sslcontext":
            return life.config
        if life.session is not None:
            if name == "hybridkex_session":
                return self.session
            if name == "ssl_object":
                return SslObject(life.session, server_side=isinstance(life.config, ServerConfig))
            if name == "cipher":
                return cipher_of(life.session)
            if name == "peercert":
                return peercert_of(life.session)
        return life.get_extra_info(name, default)

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Replace the application's protocol."""
        self._life.set_protocol(protocol)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """The application's protocol."""
        return self._life.protocol

    def is_closing(self) -> bool:
        """Whether this transport or the one below is closed or is being closed."""
        return self._life.is_closing()

    def is_reading(self) -> bool:
        """Whether received data is delivered."""
        return self.receiver.is_reading

    def pause_reading(self) -> None:
        """Stop the delivery of data until :meth:`resume_reading`."""
        self.receiver.pause()

    def resume_reading(self) -> None:
        """Continue the delivery of data, beginning with the data that waits."""
        self.receiver.resume()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send data. This does not block; what cannot be sent now waits.

        Raises:
            RuntimeError: ``write_eof`` was called.
        """
        self._writing.write(data)

    def writelines(self, list_of_data: Iterable[bytes | bytearray | memoryview]) -> None:
        """Send each of ``list_of_data``."""
        for data in list_of_data:
            self._writing.write(data)

    def can_write_eof(self) -> bool:
        """Always true: TLS 1.3 has half-close."""
        return True

    def write_eof(self) -> None:
        """Send close_notify after the data that was written. Receiving continues."""
        self._writing.write_eof()

    @property
    def _protocol_paused(self) -> bool:
        return self._writing.paused  # for loop.sendfile

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks, in bytes, at which ``pause_writing`` and ``resume_writing`` are called.

        They apply to the data that waits to be encrypted and to the buffer of the transport below,
        each on its own.

        Raises:
            ValueError: ``high >= low >= 0`` does not hold.
        """
        self._set_write_buffer_limits(high, low)  # type: ignore[attr-defined]
        self._writing.set_marks(self._high_water, self._low_water)

    def get_write_buffer_size(self) -> int:
        """Bytes that wait to be sent."""
        return self._writing.unsent

    def close(self) -> None:
        """Send the data that was written and close_notify, and close when the peer's has come.

        Data that is received meanwhile is discarded. If the peer has not answered within
        ``ssl_shutdown_timeout``, the connection is aborted; if it has not taken all of our data
        either, ``connection_lost`` gets a :exc:`SecureConnectionError`.
        """
        self._life.close()

    def abort(self) -> None:
        """Close at once. Data that waits is lost, and no alert is sent."""
        self._life.abort()


def time_limits(handshake: float | None, shutdown: float | None) -> tuple[float, float]:
    """Apply the defaults to the time limits, in seconds, with the checks of asyncio's own TLS.

    Raises:
        ValueError: one of them is not positive.
    """
    for name, value in (("handshake", handshake), ("shutdown", shutdown)):
        if value is not None and not value > 0:  # nor is nan
            raise ValueError(f"ssl_{name}_timeout should be a positive number, got {value}")
    return (
        _HANDSHAKE_TIMEOUT if handshake is None else handshake,
        _SHUTDOWN_TIMEOUT if shutdown is None else shutdown,
    )
