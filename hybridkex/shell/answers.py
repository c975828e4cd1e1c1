"""Answers to the engine's requests: the PSK to use, and whether a session is accepted."""

from collections.abc import Callable
from typing import Final

from hybridkex.crypto.psk import ExternalPsk
from hybridkex.errors import (
    InternalError,
    KeyConsumed,
    KeyExpired,
    KeySourceError,
    KeyUnknown,
    UnknownPskIdentity,
)
from hybridkex.fields import check_result
from hybridkex.net.event_loop import in_thread
from hybridkex.tls.config import ClientConfig, PskSource, ServerConfig
from hybridkex.tls.connection import ClientConnection, ServerConnection
from hybridkex.tls.events import PskWanted, SessionProposed
from hybridkex.tls.policy import Requirement
from hybridkex.tls.session import Session

CODE_FAILED: Final = "a callback of the configuration failed (PSK source, verifier, ...)"
"""The logged reason of internal_error after such code raised something other than a
``HybridkexError``."""


class Answers:
    """Answers the requests of one connection's engine according to its configuration.

    Args:
        config: the configuration of the connection.
        connection: its engine.
    """

    def __init__(
        self, config: ClientConfig | ServerConfig, connection: ClientConnection | ServerConnection
    ) -> None:
        self._connection = connection
        self._psk_source = config.psk_source
        self._psk_required = config.policy_in_force.psk is Requirement.REQUIRE
        self._psk_missing: str | None = None
        verifier: object = (
            config.verifier if isinstance(config, ClientConfig) else config.client_verifier
        )
        store: object = config.ticket_store if isinstance(config, ClientConfig) else None
        # Attribute look-ups for Refreshable and FlushableTicketStore; isinstance with a protocol
        # takes 20 times as long.
        self._refresh: Callable[[], None] | None = getattr(verifier, "refresh", None)
        self._flush: Callable[[], None] | None = getattr(store, "flush", None)

    @property
    def keeps_tickets(self) -> bool:
        """Whether :meth:`keep_tickets` has anything to do."""
        return self._flush is not None

    async def keep_tickets(self) -> None:
        """Write the ticket store to disk, after the handshake and after ``TicketReceived``.

        Raises:
            ConfigError: it cannot be written.
        """
        if self._flush is not None:
            await in_thread(self._flush, abandon=True)

    @property
    def waits_to_begin(self) -> bool:
        """Whether the start of the handshake reads or writes files, so that :meth:`begin` may
        block."""
        return self._refresh is not None or self._flush is not None

    async def begin(self) -> None:
        """Refresh the verifier and start the handshake.

        When this returns, a ticket that the ClientHello offers has been removed from the disk.
        """
        if self._refresh is not None:
            await in_thread(self._refresh, abandon=True)
        self.begin_at_once()
        try:
            await self.keep_tickets()
        except BaseException:
            self._connection.release()  # the ClientHello is not sent: its ticket is still stored
            raise

    def begin_at_once(self) -> None:
        """Start the handshake if :attr:`waits_to_begin` is false."""
        if isinstance(self._connection, ClientConnection):
            self._connection.start()

    def waits(self, event: PskWanted | SessionProposed) -> bool:
        """Whether the answer needs a key source or a file, so that :meth:`give` may block."""
        if isinstance(event, PskWanted):
            return True
        return event.peer is not None and event.peer.remember is not None

    async def give(self, event: PskWanted | SessionProposed) -> None:
        """Answer a request. After any exception, the caller ends the engine with ``abort``.

        Raises:
            PeerError: the session is refused.
            KeySourceError: the policy requires a PSK and the source has none; the alert is in the
                engine's ``data_to_send``.
        """
        if isinstance(event, PskWanted):
            source = self._psk_source
            psk = await self._psk(source, event) if source is not None else None
            self._connection.provide_psk(psk)
        else:
            session = self._authorized(event)
            if event.peer is not None and event.peer.remember is not None:
                await in_thread(event.peer.remember, abandon=True)  # it writes a file
            self._connection.accept(session)

    def give_at_once(self, event: SessionProposed) -> None:
        """Answer a request for which :meth:`waits` is false. Raises as :meth:`give` does."""
        self._connection.accept(self._authorized(event))

    async def _psk(self, source: PskSource, event: PskWanted) -> ExternalPsk | None:
        """A PSK of the source; without one the policy decides."""
        try:
            if isinstance(self._connection, ClientConnection):
                return check_result(await source.offer(), ExternalPsk, source, "offer")
            found = await source.look_up(event.identities)
            return check_result(found, ExternalPsk, source, "look_up")
        except KeySourceError as error:
            if self._psk_required:
                unknown = isinstance(error, KeyUnknown | KeyConsumed | KeyExpired)
                refusal = UnknownPskIdentity if unknown else InternalError
                self._connection.abort(refusal("no external PSK"))
                raise
            self._psk_missing = str(error)
            return None

    def _authorized(self, proposed: SessionProposed) -> Session:
        if self._psk_source is None:
            return proposed.session
        session = self._psk_source.authorize(proposed.session, self._psk_missing)
        # The engine takes None for the session that it proposed.
        return check_result(session, Session, self._psk_source, "authorize")
