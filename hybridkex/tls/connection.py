"""The engine, in the style of h11: bytes in, events out, bytes out.

``receive_data`` takes bytes from the transport, ``next_event`` returns the events in them, and
``data_to_send`` returns the bytes for the transport. Nothing here blocks or does I/O. After an
error every later call raises, and ``data_to_send`` still returns the alert for the peer.
"""

from collections.abc import Callable
from typing import Final, TypeVar

from hybridkex.auth import DnsName, IpAddress, parse_peer_name
from hybridkex.constants import Alert
from hybridkex.crypto.one_time_pad import OVERHEAD, Pad
from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import (
    AlertReceived,
    ConfigError,
    HybridkexError,
    InternalError,
    LocalStateError,
    PeerError,
    TruncationError,
    UnexpectedMessage,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.tls import client, server
from hybridkex.tls.config import ClientConfig, ServerConfig, check_config
from hybridkex.tls.epochs import UpdateKey
from hybridkex.tls.events import ApplicationData, CloseReceived, Event
from hybridkex.tls.extended_key_update import Updates
from hybridkex.tls.one_time_pad import MAX_PAD_KEYS, PadBudget, available
from hybridkex.tls.record_layer import AlertItem, DataItem, RecordLayer
from hybridkex.tls.session import Session
from hybridkex.tls.traffic import ClientTraffic, Connected, ServerTraffic
from hybridkex.wire.messages import decode
from hybridkex.wire.update_messages import PadKey

_MAX_WARNINGS = 4
"""The number of ``user_canceled`` alerts to ignore; more of them are an attack or a bug."""

State = client.ClientState | server.ServerState | ClientTraffic | ServerTraffic
E = TypeVar("E", bound=BaseException)

# Tuples: a union would be built again in every call, and isinstance takes longer with it.
_WAIT_PSK: Final = (client.WaitPsk, server.WaitPsk)
_PROPOSED: Final = (client.Proposed, server.Proposed)
_WAITING: Final = frozenset((*_WAIT_PSK, *_PROPOSED))
_STEPS: Final = {**client.STEPS, **server.STEPS}
_TRAFFIC: Final = (ClientTraffic, ServerTraffic)


class Connection:
    """The common base of :class:`ClientConnection` and :class:`ServerConnection`."""

    _first: tuple[type, ...]
    """The states in which a handshake may begin."""

    def __init__(self, records: RecordLayer) -> None:
        self._records = records
        self._state: State | None = None
        # A copy: the error refers to its traceback, the traceback to our frames, and the frames to
        # this object, so that the keys of a failed connection would stay in memory until the
        # garbage collector runs.
        self._error: HybridkexError | None = None
        self._session: Session | None = None
        """The session of a connection that has been released."""
        self._close_received = False
        self._close_sent = False
        self._warnings = 0
        # The fast path of receive_record and seal_record: set while a record of application data
        # would change no state but the number of records. Anything that may change a state clears
        # them, and the next complete pass through the normal path sets them again.
        self._open_one: Callable[[memoryview, memoryview], bytes | None] | None = None
        self._seal_one: Callable[[bytes], bytes | None] | None = None

    # --- in -----------------------------------------------------------------------------------

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the transport; empty bytes mean end of file.

        Raises:
            TruncationError: the transport ended without close_notify.
        """
        self._open_one = None
        self._check_alive()
        if self._close_received:
            return  # Data after close_notify must be ignored (section 6.1).
        if data:
            self._records.reader.incoming.feed(data)
            return
        if self.next_event_waits:
            raise LocalStateError("take all events before reporting the end of the transport")
        if isinstance(self._state, _TRAFFIC):
            raise self._ended_by(TruncationError())
        raise self._ended_by(
            TruncationError(
                "the other end closed the connection during the handshake; see its log, or the log "
                "of a proxy on the path"
            )
        )

    def keep(self) -> None:
        """Copy the bytes from :meth:`receive_data` that no event has taken yet, so that the caller
        may change its buffer."""
        self._records.reader.incoming.keep()

    def receive_record(self, head: memoryview, fragment: memoryview) -> bytes | None:
        """Take one short record of application data: :meth:`receive_data` and :meth:`next_event` in
        one call, for short messages.

        Args:
            head: the first five bytes from the transport: the record header.
            fragment: the bytes after them.

        Returns:
            The application data, or ``None`` if the bytes are anything else, valid or not. In that
            case nothing has been taken: pass them to :meth:`receive_data`.
        """
        open_one = self._open_one
        return None if open_one is None else open_one(head, fragment)

    @property
    def next_event_waits(self) -> bool:
        """Whether an event is ready without parsing more bytes."""
        return bool(self._records.events)

    @property
    def has_unread(self) -> bool:
        """Whether received bytes wait to become an event, or an event waits for
        :meth:`next_event`."""
        return bool(self._records.events) or self._records.reader.has_unread

    @property
    def update_wanted(self) -> bool:
        """Whether an :class:`~hybridkex.tls.events.UpdateWanted` has been emitted and no update has
        followed. It is emitted while data is sent, and a caller that sends may take no events."""
        return isinstance(self._state, _TRAFFIC) and self._state.update_wanted

    def next_event(self) -> Event | None:
        """Return the next event, or ``None`` until the caller provides more bytes, a PSK or a
        decision.

        Raises:
            PeerError: the peer broke the protocol or was refused; the alert is in ``data_to_send``.
            AlertReceived: the peer ended the connection.
        """
        records = self._records
        if records.events:
            return records.events.popleft()
        self._check_alive()
        while not self._close_received and type(self._state) not in _WAITING:
            try:
                item = records.reader.next_item()
                if item is None:
                    state = self._state
                    if isinstance(state, _TRAFFIC) and state.receives_only:
                        self._open_one = records.reader.open_one
                    return None
                if type(item) is DataItem:
                    assert isinstance(self._state, _TRAFFIC)  # no data passes the reader before
                    self._state.data_received()
                    return ApplicationData(item.data)
                if type(item) is bytes:
                    self._message(item)
                elif type(item) is AlertItem:
                    self._alert(item)
            except PeerError as error:
                self._fail(error)
                raise
            if records.events:
                return records.events.popleft()
        return None

    def _message(self, raw: bytes) -> None:
        state = self._state
        if state is None:
            raise LocalStateError("the handshake has not been started")
        self._seal_one = None
        if raw[0] not in _STEPS[type(state)].receives:
            raise UnexpectedMessage(
                f"handshake message of type {raw[0]} while in {type(state).__name__}",
                Reason.UNEXPECTED_MESSAGE,
            )
        self._enter(state.handle(decode(raw), raw, self._records))

    def _enter(self, state: State) -> None:
        """Enter the next state, which the table must allow."""
        before = self._state
        allowed = self._first if before is None else _STEPS[type(before)].then
        if type(state) not in allowed:
            raise InternalError(f"{type(state).__name__} after {type(before).__name__}")
        self._state = state

    def _alert(self, alert: AlertItem) -> None:
        goes_on = alert.description in (Alert.CLOSE_NOTIFY, Alert.USER_CANCELED)
        if goes_on and self._records.reader.confirmation_due:
            raise UnexpectedMessage(
                "an alert under a new key before the peer confirmed that key",
                Reason.UPDATE_NOT_CONFIRMED,
            )
        if alert.description == Alert.CLOSE_NOTIFY:
            if not self.handshake_complete:
                raise self._ended_by(AlertReceived(alert.description))
            self._close_received = True
            self._erase_pad()
            self._records.emit(CloseReceived())
        elif alert.description == Alert.USER_CANCELED:
            # Section 6.1: "This alert generally has AlertLevel=warning. Receiving implementations
            # SHOULD continue to read data from the peer until a 'close_notify' is received".
            self._warnings += 1
            if self._warnings > _MAX_WARNINGS:
                raise UnexpectedMessage("too many user_canceled alerts", Reason.WARNINGS_TOO_MANY)
        else:
            self._ended()
            raise self._ended_by(AlertReceived(alert.description))

    def _ended(self) -> None:
        """Handle the end of the handshake by the peer."""

    def _ended_by(self, error: HybridkexError) -> HybridkexError:
        """End receiving and sending, for this reason; returns it."""
        self._error = _without_traceback(error)
        self._open_one = self._seal_one = None
        self._erase_pad()
        if self._records.writer.pad is not None:
            self._records.writer.pad.erase()
        return error

    def _erase_pad(self) -> None:
        """Erase the pad for receiving, when no more data is received."""
        if self._records.reader.pad is not None:
            self._records.reader.pad.erase()

    # --- out ----------------------------------------------------------------------------------

    def send_data(self, data: bytes | bytearray | memoryview) -> None:
        """Queue application data as records for ``data_to_send``; the data is copied only once."""
        self._check_alive()
        state = self._state
        if not isinstance(state, _TRAFFIC):
            raise LocalStateError("the handshake is not complete")
        if self._close_sent:
            raise LocalStateError("close_notify has been sent")
        self._seal_one = None
        view = data if type(data) is memoryview else memoryview(data)
        if view:
            state.send_data(view, self._records)
            if self._records.events:
                # A key update is due, and receive_record would not return its event.
                self._open_one = None

    def seal_record(self, data: bytes) -> bytes | None:
        """Make the record of a short message: :meth:`send_data` and :meth:`data_to_send` in one
        call.

        Returns:
            The bytes for the transport, or ``None`` if ``data`` is not short or the engine has more
            to send. In that case nothing has changed: pass ``data`` to :meth:`send_data`.
        """
        seal_one = self._seal_one
        return None if seal_one is None else seal_one(data)

    def send_close(self) -> None:
        """Queue close_notify: we send no more data. Receiving continues (section 6.1)."""
        self._check_alive()
        if not self._close_sent:
            self._close_sent, self._seal_one = True, None
            self._records.writer.send_alert(Alert.CLOSE_NOTIFY)

    def provide_psk(self, psk: ExternalPsk | None) -> None:
        """Answer the event ``PskWanted`` with a PSK (at a server, for one of the identities in the
        event) or with ``None``.

        Raises:
            PeerError: the handshake fails: the policy requires a PSK and there is none, or the
                client has another key under this identity.
        """
        self._check_alive()
        state = self._state
        if not isinstance(state, _WAIT_PSK):
            raise LocalStateError("no PSK is wanted")
        try:
            self._enter(state.provide(psk, self._records))
        except PeerError as error:
            self._fail(error)
            raise

    def accept(self, session: Session | None = None) -> None:
        """Answer the event ``SessionProposed``, so that the handshake completes.

        Args:
            session: the proposed session, completed by the caller (with the QKD keys, for example);
                ``None`` accepts it unchanged. It becomes :attr:`session`.
        """
        self._check_alive()
        state = self._state
        if not isinstance(state, _PROPOSED):
            raise LocalStateError("no session is proposed")
        self._enter(state.accept(state.session if session is None else session, self._records))

    def update_keys(self, *, request_peer: bool = False) -> None:
        """Change our key now and ask the peer to change its key (section 4.7.3)."""
        self._check_alive()
        if not isinstance(self._state, _TRAFFIC) or self._close_sent:
            raise LocalStateError(
                "keys can be updated only after the handshake and before the connection is closed"
            )
        self._seal_one = None
        self._state.update_keys(self._records, request=request_peer)

    def start_update(
        self, key: UpdateKey | None = None, *, missing: str | None = None, why: str = "asked"
    ) -> None:
        """Start an Extended Key Update; the event ``EpochBegan`` reports its completion.

        Args:
            key: the QKD key for it.
            missing: why there is none, if the policy asks for one.
            why: the trigger, for :attr:`~hybridkex.tls.epochs.Epoch.why`.

        Raises:
            LocalStateError: Extended Key Update was not negotiated, an update is under way, a
                direction of the connection is closed, or a QKD key is missing or not allowed.
        """
        updates = self._updates(
            "a key update can start only after the handshake and before the connection is closed"
        )
        if self._close_sent or self._close_received:
            raise LocalStateError(
                "a key update can start only after the handshake and before the connection is "
                "closed"
            )
        self._seal_one = None
        updates.start(self._records, key, missing, why)

    def provide_update_key(self, key: UpdateKey | None, missing: str | None = None) -> None:
        """Answer the event ``UpdateKeyWanted`` with the key, or with ``None`` and the reason.

        Raises:
            LocalStateError: no key is wanted, or the key is not the wanted one.
            PeerError: the peer's key share is invalid.
        """
        updates = self._updates("no key is wanted for a key update")
        self._seal_one = None
        try:
            updates.provide(self._records, key, missing)
        except PeerError as error:
            self._fail(error)
            raise

    def _updates(self, otherwise: str) -> Updates:
        self._check_alive()
        if not isinstance(self._state, _TRAFFIC):
            raise LocalStateError(otherwise)
        updates = self._state.connected.updates
        if updates is None:
            raise LocalStateError("Extended Key Update was not negotiated with this peer")
        return updates

    @property
    def update_under_way(self) -> bool:
        """Whether either side has an Extended Key Update under way."""
        updates = self._connected().updates
        return updates is not None and updates.under_way

    @property
    def updates_take_keys(self) -> bool:
        """Whether an Extended Key Update has a slot for a QKD key, and our policy asks for one in
        it."""
        updates = self._connected().updates
        return updates is not None and updates.takes_keys

    def extend_pad(self, identity: bytes, key: Secret) -> None:
        """Append a QKD key to the one-time pad of our direction, and send its identity to the peer.

        Args:
            identity: its ``QkdIdentity``.
            key: a key that is used for nothing else.

        Raises:
            LocalStateError: no one-time pad was negotiated, our direction is closed, or 1,024 keys
                are still unused.
        """
        pad = self._pad(self._records.writer.pad)
        if self._close_sent:
            raise LocalStateError("close_notify has been sent")
        if pad.keys >= MAX_PAD_KEYS:
            raise LocalStateError(f"the one-time pad has {MAX_PAD_KEYS:,} keys already")
        if not len(key):
            raise LocalStateError("an empty key cannot extend a one-time pad")
        self._seal_one = None
        pad.extend(key)
        self._records.writer.send(PadKey(identity))

    def provide_pad_key(self, key: Secret) -> None:
        """Answer the oldest event ``PadKeyWanted``. If the key is not available, call
        :meth:`abort`.

        Raises:
            LocalStateError: no key is wanted.
        """
        pad, reader = self._pad(self._records.reader.pad), self._records.reader
        if not reader.pad_keys_due or not len(key):
            raise LocalStateError(
                "no key is wanted for the peer's one-time pad, or the key is empty"
            )
        reader.pad_keys_due -= 1
        if not self._close_received:
            pad.extend(key)

    def _pad(self, pad: Pad | None) -> Pad:
        self._check_alive()
        if pad is None:
            raise LocalStateError("no one-time pad was negotiated with this peer")
        return pad

    @property
    def waits_for_pad(self) -> bool:
        """Whether received data waits for :meth:`provide_pad_key`; until then, do not call
        :meth:`receive_data`."""
        return self._records.reader.waits_for_pad

    @property
    def pad(self) -> PadBudget | None:
        """The remaining one-time pads; ``None`` if none was negotiated."""
        ours, theirs = self._records.writer.pad, self._records.reader.pad
        if ours is None or theirs is None:
            return None
        return PadBudget(
            sending=available(ours),
            sent=ours.used,
            receiving=theirs.left,
            received=theirs.used,
            record=self._records.writer.record_limit - OVERHEAD,
        )

    def abort(self, error: HybridkexError) -> None:
        """End the connection for a reason of the caller, and queue the alert: that of a
        ``PeerError``, and internal_error for any other reason.

        This also refuses a proposed session. A connection that has failed stays as it is.
        """
        if self._error is None:
            self._fail(error)

    def reason_of(self, error: HybridkexError) -> HybridkexError:
        """The first failure of the connection if ``error`` only comes from a later call."""
        if isinstance(error, LocalStateError) and self._error is not None:
            return self._error
        return error

    def release(self) -> None:
        """Discard all keys, after the connection has failed or its transport was closed.

        A program may keep the object of a closed connection for a long time. Only :attr:`session`,
        :attr:`pad`, :attr:`close_sent` and :attr:`close_received` remain; everything else raises
        :exc:`~hybridkex.LocalStateError`.
        """
        if isinstance(self._state, _TRAFFIC):
            self._session = self._state.connected.session
        if self._error is None:
            self._error = LocalStateError("it was closed during the handshake")
        self._open_one = self._seal_one = self._state = None
        self._records.release()

    @property
    def has_data_to_send(self) -> bool:
        """Whether ``data_to_send`` would return any bytes."""
        return self._records.writer.has_output

    def data_to_send(self) -> bytes | bytearray:
        """All bytes that wait for the transport; each byte is returned once."""
        writer, state = self._records.writer, self._state
        output = writer.take_output()
        if (
            isinstance(state, _TRAFFIC)
            and state.sends_only
            and self._error is None
            and not self._close_sent
        ):
            self._seal_one = writer.seal_one
        return output

    def trailing_data(self) -> bytes:
        """The bytes after the peer's close_notify, which are not TLS."""
        return self._records.reader.incoming.drain() if self._close_received else b""

    # --- properties ---------------------------------------------------------------------------

    @property
    def handshake_complete(self) -> bool:
        """Whether application data may be sent and received."""
        return isinstance(self._state, _TRAFFIC)

    @property
    def failed(self) -> bool:
        """Whether an error has ended the connection."""
        return self._error is not None

    @property
    def close_received(self) -> bool:
        """Whether the peer has sent close_notify."""
        return self._close_received

    @property
    def close_sent(self) -> bool:
        """Whether we have sent close_notify."""
        return self._close_sent

    @property
    def session(self) -> Session:
        """The properties of the connection: where its keys come from, and who the peer is.

        Raises:
            LocalStateError: the handshake is not complete.
        """
        return self._connected().session if self._session is None else self._session

    def export(self, label: bytes, context: bytes, length: int) -> Secret:
        """Export ``length`` bytes of keying material for an application protocol (section 7.5)."""
        return self._connected().exporter.export(label, context, length)

    def export_fresh(self, label: bytes, context: bytes, length: int) -> Secret:
        """Like :meth:`export`, from the exporter secret of the current epoch
        (draft-ietf-tls-extended-key-update-13 section 10).

        Raises:
            LocalStateError: the handshake is not complete, or Extended Key Update was not
                negotiated.
        """
        updates = self._connected().updates
        if updates is None:
            raise LocalStateError("Extended Key Update was not negotiated with this peer")
        return updates.exporter.export(label, context, length)

    def _connected(self) -> Connected:
        self._check_kept()
        if not isinstance(self._state, _TRAFFIC):
            raise LocalStateError("the handshake is not complete")
        return self._state.connected

    def _check_kept(self) -> None:
        if self._session is not None:
            raise LocalStateError("the connection was closed, and its keys have been discarded")

    def _check_alive(self) -> None:
        if self._error is not None:
            self._check_kept()
            raise LocalStateError(f"the connection has failed: {self._error}") from self._error

    def _fail(self, error: HybridkexError) -> None:
        alert = error.alert if isinstance(error, PeerError) else Alert.INTERNAL_ERROR
        alerts = [alert]
        if alert is Alert.USER_CANCELED:  # cancellation alone ends nothing (section 6.1)
            alerts.append(Alert.CLOSE_NOTIFY)
        if not self._close_sent:  # nothing follows a close_notify (section 6.1)
            for one in alerts:
                self._records.writer.send_alert(one)
        self._ended_by(error)


class ClientConnection(Connection):
    """The client's side.

    Args:
        config: the client's configuration.
        server_hostname: a DNS name or an IP address that the certificate must be valid for.

    Raises:
        ConfigError: ``config`` is not a ``ClientConfig``, or the name is not a host name or an
            address.
    """

    _first = client.START

    def __init__(self, config: ClientConfig, server_hostname: str | None = None) -> None:
        check_config(config, ClientConfig)
        super().__init__(RecordLayer(config))
        self._config = config
        self._name: DnsName | IpAddress | None = (
            parse_peer_name(server_hostname) if server_hostname is not None else None
        )

    def start(self) -> None:
        """Queue the ClientHello.

        Raises:
            LocalStateError: it was started before, or has ended.
        """
        self._check_alive()
        if self._state is not None:
            raise LocalStateError("the handshake was started before")
        self._enter(client.start(self._config, self._name, self._records))

    def _ended(self) -> None:
        if isinstance(self._state, client.WaitServerHello | client.WaitSecondServerHello):
            client.forget_tickets(self._state.offer)


class ServerConnection(Connection):
    """The server's side; it begins by waiting for the ClientHello.

    Args:
        config: the server's configuration.

    Raises:
        ConfigError: ``config`` is not a ``ServerConfig``.
    """

    _first = server.START

    def __init__(self, config: ServerConfig) -> None:
        check_config(config, ServerConfig)
        super().__init__(RecordLayer(config))
        self._enter(server.start(config, self._records))


def connection_for(
    config: ClientConfig | ServerConfig, server_hostname: str | None
) -> ClientConnection | ServerConnection:
    """Make the engine of the role that a configuration is for.

    Raises:
        ConfigError: ``config`` is not a configuration, or ``server_hostname`` is given for a
            server.
    """
    check_config(config, ClientConfig, ServerConfig)
    if isinstance(config, ClientConfig):
        return ClientConnection(config, server_hostname)
    if server_hostname is not None:
        raise ConfigError("server_hostname is for clients: it needs a ClientConfig")
    return ServerConnection(config)


def _without_traceback(error: E) -> E:
    """A copy of an error and of its causes."""
    copy, cause = type(error).__new__(type(error), *error.args), error.__cause__
    copy.__dict__.update(error.__dict__)
    if cause is not None and cause is not error:
        copy.__cause__ = _without_traceback(cause)
    return copy
