"""A client that reconnects and resumes the conversation when its connection breaks.

The state of the conversation is a token, the number of the last action and the last entry that was
received. It outlives each connection. After a break the client opens another connection, with its
own handshake and QKD keys, and sends its unacknowledged actions again; the server recognises
repeated actions by their numbers.
"""

import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from hybridkex.apps import Backoff

from .protocol import (
    Accepted,
    Action,
    Ask,
    Bye,
    ChatError,
    Entry,
    Frames,
    Hello,
    Notice,
    ProtocolError,
    Welcome,
)

__all__ = ["Client", "Connect"]

_log = logging.getLogger("examples.chat")

Connect = Callable[[], Awaitable[trio.abc.Stream]]
"""Opens a connection, including the handshake; raises ``OSError`` or
``trio.BrokenResourceError``."""

_WELCOME_WITHIN: Final = 30.0
_ACKNOWLEDGED_WITHIN: Final = 30.0
_LEAVE_WITHIN: Final = 5.0
_UNACKNOWLEDGED: Final = 200
_NO_CONNECTION: Final = (
    OSError,
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trio.TooSlowError,
    ProtocolError,
)


class Client:
    """One slot in a conversation.

    Args:
        connect: opens a connection.
        backoff: the delays between attempts to connect.
    """

    def __init__(
        self,
        connect: Connect,
        nickname: str,
        room: str,
        *,
        backoff: Backoff | None = None,
    ) -> None:
        self._connect = connect
        self._backoff = backoff or Backoff(first=0.5, most=30.0)
        self._token = secrets.token_hex(32)
        self._seen = 0
        self._number = 0
        self._outbox: deque[Action] = deque()
        self._changed = trio.Condition()
        self._frames: Frames | None = None
        self._questions: deque[Ask] = deque(maxlen=8)
        self._leaving = False
        self._put, self.news = trio.open_memory_channel[Entry | Notice](100)
        """Events in the room, and notices for the user."""
        self.nickname: Final = nickname
        self.room = room
        self.connections = 0
        """The number of connections so far."""
        self.trouble: str | None = None
        """The reason why there is no connection."""

    @property
    def online(self) -> bool:
        """Whether the client is connected."""
        return self._frames is not None

    @property
    def unacknowledged(self) -> int:
        """The number of actions that the server has not acknowledged."""
        return len(self._outbox)

    @property
    def outbox(self) -> tuple[Action, ...]:
        """The actions that the server has not acknowledged."""
        return tuple(self._outbox)

    # --- what the user does -------------------------------------------------------------------

    async def say(self, text: str) -> None:
        """Say something in the room. Waits while too many actions are unacknowledged."""
        await self._act("say", text)

    async def join(self, room: str) -> None:
        """Go to another room."""
        await self._act("join", room)

    async def ask(self, what: str) -> None:
        """Ask ``who`` is in the room, or which ``rooms`` exist; the answer arrives as news."""
        async with self._changed:
            self._questions.append(Ask(what))
            self._changed.notify_all()

    async def leave(self) -> None:
        """Leave, once the server has acknowledged all actions, or after a few seconds."""
        with trio.move_on_after(_LEAVE_WITHIN):
            await self._act("leave", "")
            self._leaving = True
            async with self._changed:
                while self._outbox:
                    await self._changed.wait()
        self._leaving = True
        await self._put.aclose()

    async def _act(self, verb: str, text: str) -> None:
        async with self._changed:
            while len(self._outbox) >= _UNACKNOWLEDGED:
                await self._changed.wait()
            action = Action(self._number + 1, verb, text)
            self._number += 1
            self._outbox.append(action)
            self._changed.notify_all()

    # --- connections --------------------------------------------------------------------------

    async def run(self) -> None:
        """Stay connected until :meth:`leave`.

        Raises:
            ChatError: the server has ended the conversation.
            OSError, trio.BrokenResourceError, ProtocolError: the first attempt to connect failed;
                later failures are retried.
        """
        frames = await self._open()
        while True:
            try:
                await self._use(frames)
            finally:
                self._frames = None
                with trio.move_on_after(1):
                    await frames.stream.aclose()  # also when cancelled
            if self._leaving and not self._outbox:
                return
            frames = await self._reconnect()

    async def _use(self, frames: Frames) -> None:
        """Send and receive over a connection until it ends."""
        self._frames, self.trouble = frames, None
        ended: list[Bye] = []
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send, frames, nursery.cancel_scope)
            nursery.start_soon(self._receive, frames, nursery.cancel_scope, ended)
            nursery.start_soon(self._expect_acknowledgements, nursery.cancel_scope)
        if ended and not ended[0].again:
            if not self._leaving:
                raise ChatError(ended[0].reason)
            self._outbox.clear()
        if ended:
            self.trouble = ended[0].reason

    async def _reconnect(self) -> Frames:
        while True:
            wait = self._backoff.next()
            self.trouble = f"{self.trouble or 'the connection broke'}; next attempt in {wait:.1f} s"
            _log.info("%s", self.trouble)
            await trio.sleep(wait)
            try:
                frames = await self._open()
            except _NO_CONNECTION as error:
                self.trouble = _reason(error)
                continue
            self._backoff.reset()
            return frames

    async def _open(self) -> Frames:
        """Connect, and exchange Hello and Welcome."""
        with trio.fail_after(_WELCOME_WITHIN):
            stream = await self._connect()
            try:
                frames = Frames(stream)
                await frames.send(Hello(self.nickname, self.room, self._token, self._seen))
                answer = await frames.receive()
                welcome = _welcome(answer)
            except BaseException:
                await trio.aclose_forcefully(stream)
                raise
        self._settle(welcome)
        self.connections += 1
        return frames

    def _settle(self, welcome: Welcome) -> None:
        self._forget(welcome.accepted)
        if not welcome.resumed:
            # The server does not know this client (any more): number the actions from 1 again.
            self._seen = welcome.seen
            self._outbox = deque(
                Action(number, action.verb, action.text)
                for number, action in enumerate(self._outbox, 1)
            )
            self._number = len(self._outbox)
        self.room = welcome.room

    def _forget(self, number: int) -> None:
        while self._outbox and self._outbox[0].number <= number:
            self._outbox.popleft()

    async def _send(self, frames: Frames, scope: trio.CancelScope) -> None:
        sent = 0
        try:
            while True:
                async with self._changed:
                    while not self._questions and not (
                        self._outbox and self._outbox[-1].number > sent
                    ):
                        await self._changed.wait()
                    due = [action for action in self._outbox if action.number > sent]
                    asked = list(self._questions)
                    self._questions.clear()
                messages: list[Action | Ask] = [*due, *asked]
                for message in messages:
                    await frames.send(message)
                sent = max([sent, *(action.number for action in due)])
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            scope.cancel()

    async def _expect_acknowledgements(self, scope: trio.CancelScope) -> None:
        """End a connection whose server reads actions but does not acknowledge them."""
        while True:
            async with self._changed:
                while not self._outbox:
                    await self._changed.wait()
                first = self._outbox[0]
            with trio.move_on_after(_ACKNOWLEDGED_WITHIN):
                async with self._changed:
                    while self._outbox and self._outbox[0] is first:
                        await self._changed.wait()
                continue
            self.trouble = f"the server acknowledged nothing for {_ACKNOWLEDGED_WITHIN:g} s"
            scope.cancel()
            return

    async def _receive(self, frames: Frames, scope: trio.CancelScope, ended: list[Bye]) -> None:
        try:
            while (message := await frames.receive()) is not None:
                if isinstance(message, Accepted):
                    async with self._changed:
                        self._forget(message.number)
                        self._changed.notify_all()
                elif isinstance(message, Entry):
                    if message.id > self._seen:
                        await self._tell(message)
                        self._seen = message.id
                        if message.kind == "joined" and message.nickname == self.nickname:
                            self.room = message.room
                elif isinstance(message, Notice):
                    await self._tell(message)
                elif isinstance(message, Bye):
                    ended.append(message)
                    break
                else:
                    self.trouble = "the server sent a client's message"
                    break
        except (trio.BrokenResourceError, trio.ClosedResourceError, ProtocolError) as error:
            self.trouble = _reason(error)
        scope.cancel()

    async def _tell(self, news: Entry | Notice) -> None:
        # Nobody reads the news while the client is leaving.
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await self._put.send(news)


def _welcome(answer: object) -> Welcome:
    if isinstance(answer, Bye):
        raise (ProtocolError if answer.again else ChatError)(answer.reason)
    if not isinstance(answer, Welcome):
        raise ProtocolError("the server did not welcome us")
    return answer


def _reason(error: BaseException) -> str:
    return str(error.__cause__ or error) or type(error).__name__
