"""The server without its socket: slots, rooms, and the delivery of messages.

- One task writes the log; actions that arrive meanwhile go into its next transaction. An action is
acknowledged when it is on disk, and the client's next action is read after that: a client that
floods the server waits for the disk and does not affect others.
- Each connection has its own bounded queue. A client that does not read is disconnected when its
queue is full; nobody waits for it. It can reconnect and resume.
"""

import contextlib
import hmac
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, TypeVar

import trio

from .protocol import (
    Accepted,
    Action,
    Ask,
    Bye,
    ChatError,
    Entry,
    Frames,
    Hello,
    Message,
    Notice,
    ProtocolError,
    Welcome,
    encode,
)
from .store import Change, Slot, Store, digest

__all__ = ["Hub"]

_T = TypeVar("_T")
_log = logging.getLogger("examples.chat")

_HELLO_WITHIN: Final = 10.0
_FAREWELL_WITHIN: Final = 5.0
_PAGE: Final = 200
_RECORD: Final = 16 * 1024
_NAMED: Final = 100


async def _in_thread(function: Callable[..., _T], *arguments: object) -> _T:
    """Call the store in a thread. Raises ``ChatError`` if the system starts no thread."""
    try:
        return await trio.to_thread.run_sync(function, *arguments)
    except RuntimeError as error:
        raise ChatError(f"cannot start a thread for the store: {error}") from None


def _some(names: list[str]) -> str:
    """Join names with commas; of many, only the first, so that they fit in a message."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


class _Link:
    """The sending half of one connection."""

    def __init__(self, frames: Frames, queue: int) -> None:
        self._frames = frames
        self._put, self._get = trio.open_memory_channel[bytes](queue)
        self._farewell: Bye | None = None
        self._skip = False
        self._sent = trio.Event()
        self._sent.set()
        self.scope: Final = trio.CancelScope()
        self.gone: Final = trio.Event()

    def put(self, frame: bytes) -> bool:
        """Queue a frame. Returns false if the queue is full."""
        try:
            self._put.send_nowait(frame)
            if self._sent.is_set():
                self._sent = trio.Event()
        except trio.WouldBlock:
            return False
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the connection has ended already
        return True

    async def sent(self) -> None:
        """Wait until all queued frames are sent."""
        await self._sent.wait()

    def end(self, farewell: Bye | None, *, skip: bool = True) -> None:
        """Send ``farewell`` instead of the queue (``skip``) or after it, and end the connection."""
        self._farewell = farewell
        self._skip = skip
        self._put.close()
        self.scope.deadline = trio.current_time() + _FAREWELL_WITHIN

    async def send(self) -> None:
        """Send the queued frames, many at once if there are many."""
        async for frame in self._get:
            if self._skip:
                break
            record = bytearray(frame)
            try:
                while len(record) < _RECORD:
                    record += self._get.receive_nowait()
            except (trio.WouldBlock, trio.EndOfChannel):
                pass
            await self._frames.stream.send_all(record)
            if not self._get.statistics().current_buffer_used:
                self._sent.set()
        if self._farewell is not None:
            await self._frames.send(self._farewell)
        self.scope.cancel()


@dataclass(eq=False)
class _Member:
    """A participant with a slot, connected or not."""

    slot: Slot
    link: _Link | None = None
    away_since: float = 0.0
    holder: str = ""
    """The peer or network that the slot is counted for."""
    dropped: str | None = None
    """The reason why the client was disconnected, reported when it reconnects."""
    turn: trio.Lock = field(default_factory=trio.Lock)
    """Held during an action: one at a time, even if the client has several connections."""


@dataclass(eq=False)
class _Job:
    """An action to be written to the log."""

    member: _Member
    change: Change
    done: trio.Event = field(default_factory=trio.Event)
    written: bool = False


class Hub:
    """All members, rooms and connections of the server.

    Args:
        queue: maximum queued messages for one client; with more, it is disconnected.
        most: the number of slots.
        away: seconds after which a disconnected client loses its slot.
    """

    def __init__(
        self, store: Store, *, queue: int = 1000, most: int = 1000, away: float = 3600.0
    ) -> None:
        self._store = store
        self._queue = queue
        self._most = most
        self._away = away
        self._members = {slot.nickname: _Member(slot, holder=slot.peer) for slot in store.slots()}
        self._head = store.head()
        self._jobs, self._work = trio.open_memory_channel[_Job](256)
        self._connections: set[_Link] = set()

    async def run(self) -> None:
        """Write the log, and free the slots of clients that stay away, until cancelled."""
        for member in self._members.values():
            member.away_since = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write)
            nursery.start_soon(self._clean)

    async def close(self, reason: str) -> None:
        """Notify all connected clients of the shutdown; returns when they have disconnected."""
        for link in list(self._connections):
            link.end(Bye(reason, again=True))
        with trio.move_on_after(_FAREWELL_WITHIN):
            while self._connections:
                await next(iter(self._connections)).gone.wait()

    async def serve(self, stream: trio.abc.Stream, peer: str, where: str = "") -> None:
        """Serve one connection, from Hello to its end.

        Args:
            peer: the peer's verified names or its key; empty if unknown.
            where: the peer's network. Its slot is counted for the network if the peer is unknown,
                since many clients may have the same PSK.
        """
        frames = Frames(stream)
        link = _Link(frames, self._queue)
        try:
            with link.scope:
                async with trio.open_nursery() as nursery:
                    try:
                        await self._converse(nursery, frames, link, peer, peer or where)
                    except ChatError as error:
                        _log.info("%s", error)
                        link.end(Bye(str(error), again=False))
                        nursery.start_soon(link.send)
                    else:
                        link.scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client may reconnect
        finally:
            self._connections.discard(link)
            link.gone.set()
            with trio.move_on_after(_FAREWELL_WITHIN):
                await stream.aclose()

    # --- one connection -----------------------------------------------------------------------

    async def _converse(
        self, nursery: trio.Nursery, frames: Frames, link: _Link, peer: str, holder: str
    ) -> None:
        hello = None
        with trio.move_on_after(_HELLO_WITHIN):
            hello = await frames.receive()
        if hello is None:
            return
        if not isinstance(hello, Hello):
            raise ProtocolError("the first message must be hello")
        member, welcome = await self._admit(hello, peer, holder)
        member.holder = holder
        await frames.send(welcome)
        if member.link is not None:
            member.link.end(None)  # this connection replaces it
        member.link = link
        self._connections.add(link)
        # New entries go into the queue from here on; older ones are sent before them.
        up_to = self._head
        nursery.start_soon(self._send, frames, link, member, welcome.seen, up_to)
        try:
            while (message := await frames.receive()) is not None:
                if isinstance(message, Action):
                    await self._act(member, message)
                    self._tell(member, Accepted(message.number))
                    if message.verb == "leave":
                        link.end(Bye("you have left", again=False), skip=False)
                        await trio.sleep_forever()  # the farewell ends this connection
                elif isinstance(message, Ask):
                    await link.sent()  # a client that does not read gets no second answer
                    self._tell(member, Notice(self._answer(member, message.what)))
                else:
                    raise ProtocolError("only a server may send this message")
        finally:
            if member.link is link:
                member.link = None
                member.away_since = trio.current_time()

    async def _send(
        self, frames: Frames, link: _Link, member: _Member, seen: int, up_to: int
    ) -> None:
        try:
            if member.dropped is not None:
                reason, member.dropped = member.dropped, None
                await frames.send(Notice(reason))
            if seen < await _in_thread(self._store.forgotten):
                await frames.send(Notice("the oldest messages are no longer stored"))
            while page := await _in_thread(
                self._store.missed, member.slot.nickname, seen, up_to, _PAGE
            ):
                await frames.stream.send_all(b"".join(map(encode, page)))
                seen = page[-1].id
            await link.send()
        except (trio.BrokenResourceError, trio.ClosedResourceError, ChatError):
            link.scope.cancel()

    async def _admit(self, hello: Hello, peer: str, holder: str) -> tuple[_Member, Welcome]:
        token = digest(hello.token)
        while hello.nickname not in self._members and len(self._members) >= self._most:
            if not await self._free_a_slot(holder):
                raise ChatError("no slot is free")
        member = self._members.get(hello.nickname)
        if member is not None:
            slot = member.slot
            if not hmac.compare_digest(slot.token, token) or slot.peer != peer:
                raise ChatError(f"the nickname {hello.nickname!r} is taken")
            async with member.turn:
                pass  # wait for an action of an earlier connection to reach the disk
            return member, Welcome(slot.accepted, min(hello.seen, self._head), slot.room, True)
        slot = Slot(hello.nickname, token, peer, 0, hello.room)
        member = self._members[hello.nickname] = _Member(slot, holder=holder)
        member.away_since = trio.current_time()
        before = self._head
        try:
            await self._apply(member, Change("enter", slot))
        except BaseException:  # the store has not written the slot
            del self._members[hello.nickname]
            raise
        return member, Welcome(0, before, slot.room, False)

    async def _free_a_slot(self, newcomer: str) -> bool:
        """Take a slot from the holder with the most slots, if it has at least two more than the
        newcomer: the slot whose client has been away longest, or else the newest."""
        slots = Counter(member.holder for member in self._members.values())
        most = max(slots.values(), default=0)
        if most < slots[newcomer] + 2:
            return False
        theirs = [one for one in self._members.values() if slots[one.holder] == most]
        away = [one for one in theirs if one.link is None]
        if away:
            member = min(away, key=lambda one: one.away_since)
        else:
            member = theirs[-1]  # the newest
            assert member.link is not None
            reason = "your slot was needed for a participant with fewer slots"
            member.link.end(Bye(reason, again=False))
            member.link, member.away_since = None, trio.current_time()
        await self._free(member)
        return True

    async def _free(self, member: _Member) -> None:
        async with member.turn:
            if member.link is None and self._members.get(member.slot.nickname) is member:
                change = Change("leave", member.slot, member.slot.accepted + 1)
                await self._apply(member, change)

    async def _act(self, member: _Member, action: Action) -> None:
        async with member.turn:
            slot = member.slot
            if action.number <= slot.accepted:
                return  # a repeated action, which is in the log
            if action.number != slot.accepted + 1:
                raise ProtocolError("an action is missing")
            await self._apply(member, Change(action.verb, slot, action.number, action.text))

    async def _apply(self, member: _Member, change: Change) -> None:
        job = _Job(member, change)
        await self._jobs.send(job)
        with trio.CancelScope(shield=True):
            # The write completes even if the connection ends, so that a client that reconnects
            # finds the final state.
            await job.done.wait()
        if not job.written:
            raise trio.BrokenResourceError("the store could not be written")

    def _answer(self, member: _Member, what: str) -> str:
        others = self._members.values()
        if what == "who":
            room = member.slot.room
            names = sorted(
                other.slot.nickname + ("" if other.link else " (away)")
                for other in others
                if other.slot.room == room
            )
            return f"in {room}: {_some(names)}"
        if what == "rooms":
            rooms = [other.slot.room for other in others]
            return _some([f"{room} ({count})" for room, count in sorted(Counter(rooms).items())])
        raise ProtocolError("unknown question")

    # --- everybody ----------------------------------------------------------------------------

    async def _write(self) -> None:
        jobs: list[_Job] = []
        failing = False
        try:
            async for job in self._work:
                jobs = [job, *self._waiting(255)]
                changes = [one.change for one in jobs]
                try:
                    made = await _in_thread(self._store.apply, changes)
                except ChatError as error:
                    # No action is acknowledged, so clients reconnect and send them again.
                    if not failing:  # log once, not for every action
                        _log.error("%s", error)
                    failing = True
                    for one in jobs:
                        one.done.set()
                    continue
                if failing:
                    _log.warning("the store can be written again")
                failing = False
                for one, entries in zip(jobs, made, strict=True):
                    self._publish(one.member, one.change, entries)
                    one.written = True
                    one.done.set()
        finally:
            # The disk is full, or the server ends: tell waiting clients that nothing was written.
            for one in (*jobs, *self._waiting(None)):
                one.done.set()
            self._work.close()

    def _waiting(self, most: int | None) -> list[_Job]:
        """Take up to ``most`` more jobs from the queue, without waiting."""
        jobs: list[_Job] = []
        try:
            while most is None or len(jobs) < most:
                jobs.append(self._work.receive_nowait())
        except trio.WouldBlock:
            pass
        return jobs

    def _publish(self, member: _Member, change: Change, entries: list[Entry]) -> None:
        """Deliver the entries that are on disk."""
        slot = member.slot
        if change.verb != "enter":
            slot.accepted = change.number
        for entry in entries:
            self._head = entry.id
            if entry.kind == "joined":
                slot.room = entry.room
            frame = encode(entry)
            for other in self._members.values():
                if other.slot.room == entry.room:
                    self._deliver(other, frame)
        if change.verb == "leave":
            del self._members[slot.nickname]

    def _tell(self, member: _Member, message: Message) -> None:
        self._deliver(member, encode(message))

    def _deliver(self, member: _Member, frame: bytes) -> None:
        link = member.link
        if link is None or link.put(frame):
            return
        reason = f"you did not read: {self._queue} messages were waiting"
        _log.warning("%s was dropped: %s", member.slot.nickname, reason)
        member.link, member.dropped = None, f"you were dropped: {reason}"
        member.away_since = trio.current_time()
        link.end(Bye(reason, again=True))

    async def _clean(self) -> None:
        while True:
            await trio.sleep(min(60.0, self._away / 4))
            limit = trio.current_time() - self._away
            for member in list(self._members.values()):
                if member.link is None and member.away_since < limit:
                    # If the disk is full, this is tried again later.
                    with contextlib.suppress(trio.BrokenResourceError):
                        await self._free(member)
