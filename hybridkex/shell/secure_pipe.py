"""SecurePipe: a secure connection for callers that move the bytes when a socket is ready.

A stream method that waits costs its event loop more than a short record costs the engine. Here
nothing waits: the caller passes the bytes that it has read to :meth:`SecurePipe.received`, and
writes the results of :meth:`SecurePipe.sealed` to the socket, in that order.
"""

from collections.abc import Callable
from typing import Final, TypeAlias

from hybridkex.errors import HybridkexError, TruncationError
from hybridkex.shell.key_renewer import KeyRenewer
from hybridkex.shell.pad_filler import PadFiller
from hybridkex.tls.connection import ClientConnection, ServerConnection
from hybridkex.tls.events import ApplicationData
from hybridkex.tls.protection import SMALL
from hybridkex.wire.records import HEADER_LENGTH

Put: TypeAlias = Callable[[bytes | bytearray], object]


class SecurePipe:
    """The engine of one connection after its handshake; nothing here waits.

    Received session tickets are put into the ticket store, but not written to its file.

    Args:
        connection: the engine.
        renewer: renews the keys, if they are renewed.
        close_notify: whether the end of the transport without close_notify is an error.
        deliver: called with application data, in order.
        put: called with records of the engine itself, for the socket.
        resume: called when data that waited for a one-time pad can continue.
        failed: called with the error if the renewal of keys ends the connection.
    """

    def __init__(
        self,
        connection: ClientConnection | ServerConnection,
        renewer: KeyRenewer | None,
        *,
        close_notify: bool,
        deliver: Put,
        put: Put,
        resume: Callable[[], object],
        failed: Callable[[HybridkexError], object],
    ) -> None:
        self._connection = connection
        self._renewer = renewer
        self._pads: Final[PadFiller | None] = None if renewer is None else renewer.pads
        self._close_notify = close_notify
        self._deliver = deliver
        self._put = put
        self._failed = failed
        self.resume: Final = resume
        self.failure: HybridkexError | None = None
        """The error that has ended the connection."""
        self.ended = False
        """Whether the peer has ended its direction."""
        self.has_carried_data = False

    # --- in -----------------------------------------------------------------------------------

    def received(self, data: memoryview) -> None:
        """Process bytes from the socket (empty at its end) and deliver their data. The buffer may
        change afterwards.

        Raises:
            HybridkexError: the connection has failed; :meth:`alert` returns the bytes left to send.
        """
        if len(data) > HEADER_LENGTH:
            content = self._connection.receive_record(data[:HEADER_LENGTH], data[HEADER_LENGTH:])
            if content is not None:
                self._take(content)
                if self._renewer is not None:
                    self._renewer.received(len(content))
                return
        try:
            self._connection.receive_data(data)
        except HybridkexError as error:
            if isinstance(error, TruncationError) and not self._close_notify:
                self.ended = True
                return
            self._fail(error)
            raise
        self.take_events()

    def take_events(self) -> None:
        """Deliver received data that had to wait. Raises as :meth:`received`."""
        connection, renewer = self._connection, self._renewer
        try:
            while (event := connection.next_event()) is not None:
                if type(event) is ApplicationData:
                    self._take(event.data)
                if renewer is not None:
                    renewer.saw(event)
        except HybridkexError as error:
            self._fail(error)
            raise
        if renewer is not None and connection.has_data_to_send:
            renewer.wake()
        self.ended = connection.close_received

    def _take(self, data: bytes) -> None:
        self.has_carried_data = True
        self._deliver(data)

    @property
    def waits_for_pad(self) -> bool:
        """Whether received data needs a key of a one-time pad: do not read until ``resume`` is
        called."""
        return self._connection.waits_for_pad

    # --- out ----------------------------------------------------------------------------------

    @property
    def most(self) -> int | None:
        """The maximum number of bytes for one call of :meth:`sealed`; ``None`` for no limit."""
        return None if self._pads is None else self._pads.piece

    def ready(self, size: int) -> bool:
        """Whether so many bytes, up to :attr:`most`, can be sealed now; if not, ``resume`` is
        called later."""
        return self._pads is None or self._pads.ready(size)

    def sealed(self, data: memoryview | bytes | bytearray) -> bytes | bytearray:
        """The records of application data, for the socket.

        Raises:
            HybridkexError: nothing can be sent.
        """
        self.has_carried_data = True
        if self._renewer is not None:
            self._renewer.sent(len(data))
        if len(data) <= SMALL:
            record = self._connection.seal_record(bytes(data))
            if record is not None:
                return record
        self._connection.send_data(data)
        return self._connection.data_to_send()

    def closing(self) -> bytes | bytearray:
        """Our close_notify, for the socket, after all data.

        Raises:
            HybridkexError: nothing can be sent.
        """
        self._connection.send_close()
        return self._connection.data_to_send()

    def flush(self) -> None:
        """Pass on the records of the engine itself."""
        if self._connection.has_data_to_send:
            self._put(self._connection.data_to_send())

    # --- the end ------------------------------------------------------------------------------

    def alert(self) -> bytes | bytearray:
        """The bytes to send after a failure: an alert, or nothing."""
        return self._connection.data_to_send()

    def end(self, error: HybridkexError) -> None:
        """Fail for a reason of the renewal of keys."""
        if self.failure is None:
            self._fail(error)
            self._failed(error)

    def _fail(self, error: HybridkexError) -> None:
        """Record a failure; only the first one is reported."""
        if self.failure is None:
            self.failure = self._connection.reason_of(error)
            self._connection.abort(self.failure)
            if self._pads is not None:
                self._pads.stop()
