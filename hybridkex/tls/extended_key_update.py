"""Key updates of a live session: draft-ietf-tls-extended-key-update-13, with a slot for a QKD key.

:class:`Updates` is the state machine of one connection, for either end. ``docs/fresh-keys.md`` has
the order of operations; each class here is a state, named after what it waits for::

    Idle ──request──▶ WaitResponse ──response──▶ [WaitConfirm] ──▶ Idle      (initiator)
    Idle ──▶ [WaitKey] ──response──▶ WaitFinish ──finish──▶ [WaitConfirm] ──▶ Idle  (responder)

The states in brackets exist only if the slot is negotiated. A key is changed in the same call that
sends or checks the message at which it changes.
"""

import hmac
from typing import TypeAlias

from hybridkex.constants import TLS13
from hybridkex.crypto.kex import Group, Started
from hybridkex.crypto.psk import import_key
from hybridkex.crypto.schedule import ExporterSecret, TrafficSecret
from hybridkex.crypto.update_schedule import EpochSecrets, Generation
from hybridkex.errors import (
    DecryptError,
    IllegalParameter,
    LocalStateError,
    UnexpectedMessage,
)
from hybridkex.reasons import Reason
from hybridkex.secret import Secret
from hybridkex.tls.config import ClientConfig, ServerConfig
from hybridkex.tls.epochs import Epoch, KeyUpdates, UpdateKey
from hybridkex.tls.events import UpdateDeclined, UpdateKeyWanted
from hybridkex.tls.policy import Requirement
from hybridkex.tls.record_layer import RecordLayer
from hybridkex.values import value
from hybridkex.wire import update_messages as wire
from hybridkex.wire.extensions import KeyShareEntry
from hybridkex.wire.layout import Message
from hybridkex.wire.messages import ImportedIdentity

_Request: TypeAlias = wire.UpdateRequest | wire.FreshRequest
_Response: TypeAlias = wire.UpdateResponse | wire.FreshResponse


@value
class Idle:
    """No update is under way."""


@value
class WaitResponse:
    """We have sent a request."""

    started: Started
    request: bytes
    key: UpdateKey | None
    missing: str | None
    why: str
    crossed: bool = False
    """Whether a request of the peer has been ignored; at most one can be."""


@value
class WaitKey:
    """The peer has sent a request with a QKD key that our caller looks up."""

    message: wire.FreshRequest
    request: bytes


@value
class _New:
    """A derived epoch."""

    generation: Generation
    epoch: Epoch
    receiving: TrafficSecret


@value
class WaitFinish:
    """We have responded, and send under the new key."""

    new: _New


@value
class WaitConfirm:
    """Both directions have new keys; the peer has not confirmed them yet."""

    new: _New


State: TypeAlias = Idle | WaitResponse | WaitKey | WaitFinish | WaitConfirm


class Updates:
    """The key updates of one connection.

    Args:
        records: the record layer, with the keys of epoch 0 in place.
        config: the configuration; its policy in force says what an update must have.
        kind: what was negotiated: ``EXTENDED`` or ``FRESH``.
        group: the group of the handshake.
        generation: epoch 0.
    """

    def __init__(
        self,
        records: RecordLayer,
        config: ClientConfig | ServerConfig,
        kind: KeyUpdates,
        group: Group,
        generation: Generation,
    ) -> None:
        records.writer.update_early()
        self._client = isinstance(config, ClientConfig)
        self.clock = config.clock
        wanted = config.policy_in_force.fresh_qkd
        assert wanted is not None  # filled in by the configuration
        self._qkd = wanted
        self._slot = kind is KeyUpdates.FRESH
        self._group = group
        self._generation = generation
        """The newest derived generation."""
        self.number = generation.number
        """The number of the epoch that both ends are in."""
        self.exporter: ExporterSecret = generation.exporter
        """The generation of that epoch."""
        self._state: State = Idle()

    @property
    def under_way(self) -> bool:
        return not isinstance(self._state, Idle)

    @property
    def takes_keys(self) -> bool:
        """Whether there is a slot for a QKD key, and our policy asks for one in it."""
        return self._slot and self._qkd is not Requirement.OFF

    # --- what our side does -------------------------------------------------------------------

    def start(
        self, records: RecordLayer, key: UpdateKey | None, missing: str | None, why: str
    ) -> None:
        """Send a request.

        Args:
            records: the record layer.
            key: the QKD key to use.
            missing: why there is none, if the policy asks for one.
            why: the trigger, for the session.

        Raises:
            LocalStateError: an update is under way, a required QKD key is missing, or a QKD key is
                given where none is allowed.
        """
        if self.under_way:
            raise LocalStateError("a key update is under way")
        if key is not None and not self.takes_keys:
            raise LocalStateError("key updates with this peer take no QKD key")
        if key is None and self._qkd is Requirement.REQUIRE:
            raise LocalStateError("our policy requires a QKD key in each key update")
        started = self._group.exchange.start()
        share = KeyShareEntry(self._group.code, started.share)
        if self._slot:
            required = self._qkd is Requirement.REQUIRE
            demand = wire.Demand.REQUIRED if required else wire.Demand.OPTIONAL
            identity = self._identity(key) if key is not None else b""
            message: _Request = wire.FreshRequest(share, demand, identity)
        else:
            message = wire.UpdateRequest(share)
        raw = records.writer.send(message)
        if key is None and self.takes_keys:
            missing = missing or "the update was started without a QKD key"
        else:
            missing = None
        self._state = WaitResponse(started, raw, key, missing, why)

    def provide(self, records: RecordLayer, key: UpdateKey | None, missing: str | None) -> None:
        """Answer :class:`~hybridkex.tls.events.UpdateKeyWanted` with the key or with ``None``.

        Raises:
            LocalStateError: no key is wanted, or this is another one.
        """
        state = self._state
        if not isinstance(state, WaitKey):
            raise LocalStateError("no key is wanted for a key update")
        if key is not None and self._identity(key) != state.message.identity:
            raise LocalStateError("this is not the key that the peer named")
        self._answer(records, state.message, state.request, key, missing)

    # --- what the peer does -------------------------------------------------------------------

    def handle(self, message: Message, raw: bytes, records: RecordLayer) -> Epoch | None:
        """Process one post-handshake message; returns the epoch that it completes."""
        state = self._state
        match message:
            case wire.FreshConfirm(verify_data) if isinstance(state, WaitConfirm):
                return self._confirmed(state.new, verify_data, records)
            case _ if isinstance(state, WaitConfirm):
                raise UnexpectedMessage(
                    "the first message under a new key is not its confirmation",
                    Reason.UPDATE_NOT_CONFIRMED,
                )
            case wire.UpdateRequest() | wire.FreshRequest() if self._ours(message):
                self._requested(message, raw, records)
            case wire.UpdateResponse() | wire.FreshResponse() if self._ours(message) and isinstance(
                state, WaitResponse
            ):
                return self._answered(state, message, raw, records)
            case wire.FreshDecline(reason) if isinstance(state, WaitResponse) and self._slot:
                self._state = Idle()
                records.emit(UpdateDeclined(reason.name.lower()))
            case wire.UpdateFinish() if isinstance(state, WaitFinish):
                return self._finished(state.new, records)
            case wire.ExtendedKeyUpdate():
                raise UnexpectedMessage(
                    f"{message.subtype.name.lower()} of a key update in {type(state).__name__}",
                    Reason.UPDATE_OUT_OF_ORDER,
                )
            case _:
                pass  # not a message of this protocol
        return None

    def _ours(self, message: _Request | _Response) -> bool:
        """Whether the message is of the negotiated form; the other form is refused."""
        return self._slot is isinstance(message, wire.FreshRequest | wire.FreshResponse)

    def _requested(self, message: _Request, raw: bytes, records: RecordLayer) -> None:
        self._check_group(message.key_share)
        state = self._state
        if isinstance(state, WaitResponse) and not state.crossed:
            ours, theirs = state.started.share, message.key_share.share
            if theirs == ours:
                raise UnexpectedMessage(
                    "the peer's key update has our key share", Reason.UPDATES_IDENTICAL
                )
            if theirs < ours:
                self._state = WaitResponse(
                    state.started, state.request, state.key, state.missing, state.why, crossed=True
                )
                return
        elif not isinstance(state, Idle):
            raise UnexpectedMessage(
                f"a second key update in {type(state).__name__}", Reason.UPDATE_OUT_OF_ORDER
            )
        if isinstance(message, wire.FreshRequest):
            if message.demand is wire.Demand.REQUIRED and not message.identity:
                raise IllegalParameter(
                    "the peer's key update requires a QKD key and names none",
                    Reason.UPDATE_MALFORMED,
                )
            if message.identity and self.takes_keys:
                self._state = WaitKey(message, raw)
                records.emit(UpdateKeyWanted(message.identity, self.number + 1))
                return
        self._answer(records, message, raw, None, None)

    def _answer(
        self,
        records: RecordLayer,
        message: _Request,
        request: bytes,
        key: UpdateKey | None,
        missing: str | None,
    ) -> None:
        """Send the response and change our sending key, or decline."""
        self._state = Idle()
        if records.writer.closed:
            return
        if isinstance(message, wire.FreshRequest):
            decline = self._why_not(message, key)
            if decline is not None:
                records.writer.send(wire.FreshDecline(decline))
                return
        share, shared = self._group.exchange.respond(message.key_share.share)
        entry = KeyShareEntry(self._group.code, share)
        if isinstance(message, wire.FreshRequest):
            answer = wire.SlotAnswer.NOT_FOUND if message.identity else wire.SlotAnswer.EMPTY
            if key is not None:
                answer = wire.SlotAnswer.USED
            elif missing is None and self.takes_keys:
                missing = "the peer named no QKD key"
            response = records.writer.send(wire.FreshResponse(entry, answer))
        else:
            response = records.writer.send(wire.UpdateResponse(entry))
        new, sending = self._derive(request, response, shared, key, missing, "peer")
        self._change_sending(sending, new, records)
        self._state = WaitFinish(new)

    def _why_not(
        self, message: wire.FreshRequest, key: UpdateKey | None
    ) -> wire.DeclineReason | None:
        """Why no update is possible with this key, or without one."""
        if key is not None:
            return None
        if message.demand is wire.Demand.REQUIRED:
            return wire.DeclineReason.KEY_NOT_FOUND
        if self._qkd is Requirement.REQUIRE:
            return (
                wire.DeclineReason.KEY_NOT_FOUND
                if message.identity
                else wire.DeclineReason.KEY_REQUIRED
            )
        return None

    def _answered(
        self, state: WaitResponse, message: _Response, raw: bytes, records: RecordLayer
    ) -> Epoch | None:
        """Process the response: change both keys, and send the finish message between the two."""
        self._check_group(message.key_share)
        key, missing = state.key, state.missing
        if isinstance(message, wire.FreshResponse):
            key, missing = self._slot_answer(state, message.answer)
        records.reader.check_message_boundary()
        shared = state.started.finish(message.key_share.share)
        new, sending = self._derive(state.request, raw, shared, key, missing, state.why)
        epoch = self._change_receiving(new, records)
        if not records.writer.closed:  # otherwise we have nothing more to send
            records.writer.send(wire.UpdateFinish())
            self._change_sending(sending, new, records)
        return epoch

    def _slot_answer(
        self, state: WaitResponse, answer: wire.SlotAnswer
    ) -> tuple[UpdateKey | None, str | None]:
        """The key that both ends use, or why there is none."""
        if (answer is wire.SlotAnswer.EMPTY) is not (state.key is None):
            raise IllegalParameter(
                f"the answer {answer.name.lower()} does not fit the QKD slot of our request",
                Reason.UPDATE_ANSWER,
            )
        if answer is not wire.SlotAnswer.NOT_FOUND:
            return state.key, state.missing
        if self._qkd is Requirement.REQUIRE:
            raise IllegalParameter(
                "the peer continues without the QKD key that our request requires",
                Reason.UPDATE_ANSWER,
            )
        return None, "the peer did not find the QKD key"

    def _finished(self, new: _New, records: RecordLayer) -> Epoch | None:
        records.reader.check_message_boundary()
        return self._change_receiving(new, records)

    def _confirmed(self, new: _New, verify_data: bytes, records: RecordLayer) -> Epoch:
        expected = new.receiving.finished(new.generation.transcript)
        if not hmac.compare_digest(verify_data, expected):
            raise DecryptError(
                "the peer's confirmation of the new keys does not verify",
                Reason.UPDATE_CONFIRMATION,
            )
        records.reader.confirmation_due = False
        return self._complete(new)

    # --- keys ---------------------------------------------------------------------------------

    def _derive(
        self,
        request: bytes,
        response: bytes,
        shared: Secret,
        key: UpdateKey | None,
        missing: str | None,
        why: str,
    ) -> tuple[_New, TrafficSecret]:
        """Derive the new epoch and our sending key in it."""
        secrets = self._generation.next(request, response, shared, self._slot_secret(key))
        epoch = Epoch(
            number=secrets.generation.number,
            began_at=self.clock(),
            why=why,
            group=self._group.name,
            confirmed=self._slot,
            qkd_key_ids=key.key_ids if key is not None else (),
            qkd_sources=key.sources if key is not None else (),
            qkd_missing=missing if key is None else None,
        )
        self._generation = secrets.generation
        sending, receiving = self._directions(secrets)
        return _New(secrets.generation, epoch, receiving), sending

    def _directions(self, secrets: EpochSecrets) -> tuple[TrafficSecret, TrafficSecret]:
        pair = secrets.client, secrets.server
        return pair if self._client else (pair[1], pair[0])

    def _slot_secret(self, key: UpdateKey | None) -> Secret | None:
        if not self._slot:
            return None
        function = self._generation.suite.hash
        if key is None:
            return Secret(bytes(function.size))
        return import_key(key.psk, self._identity(key), function)

    def _identity(self, key: UpdateKey) -> bytes:
        """The ``ImportedIdentity`` that names a key on the wire."""
        assert key.psk.context is not None
        kdf = self._generation.suite.hash.kdf
        return ImportedIdentity(key.psk.identity, key.psk.context, TLS13, kdf).encode()

    def _change_sending(self, secret: TrafficSecret, new: _New, records: RecordLayer) -> None:
        self._log(records, secret, ours=True, number=new.generation.number)
        records.writer.change_key(secret)
        if self._slot:
            records.writer.send(wire.FreshConfirm(secret.finished(new.generation.transcript)))
            records.writer.flush()

    def _change_receiving(self, new: _New, records: RecordLayer) -> Epoch | None:
        self._log(records, new.receiving, ours=False, number=new.generation.number)
        label = f"EXPORTER_SECRET_{new.generation.number}"
        records.log_secret(label, new.generation.exporter.secret)
        records.reader.change_key(new.receiving)
        if not self._slot:
            return self._complete(new)
        records.reader.confirmation_due = True
        self._state = WaitConfirm(new)
        return None

    def _complete(self, new: _New) -> Epoch:
        self.number, self.exporter = new.generation.number, new.generation.exporter
        self._state = Idle()
        return new.epoch

    def _log(self, records: RecordLayer, secret: TrafficSecret, *, ours: bool, number: int) -> None:
        side = "CLIENT" if self._client is ours else "SERVER"
        records.log_secret(f"{side}_TRAFFIC_SECRET_{number}", secret.secret)

    def _check_group(self, share: KeyShareEntry) -> None:
        if share.group != self._group.code:
            raise IllegalParameter(
                f"a key update in the group {share.group:#06x}, where the session has "
                f"{self._group.name}",
                Reason.UPDATE_GROUP,
            )
