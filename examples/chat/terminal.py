"""The user interface: an input line with history and a status line, or plain lines in a pipe.

``prompt_toolkit`` has its own event loop, so the input line runs in a thread, which passes on one
line at a time. Output is printed above the input line.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

import trio

from hybridkex import PadBudget

from .client import Client
from .keys import left_of
from .protocol import MAX_TEXT, Action, ChatError, Entry, Notice, encode, printable

__all__ = ["Terminal"]

_HELP: Final = """\
/join ROOM   go to another room          /who     who is in this one
/keys        the origin of our keys      /rooms   the list of rooms
/quit        leave (or Ctrl-D)           //text   says "/text\""""


class Terminal:
    """Prints events, and runs the commands that the user types.

    Args:
        basis: the origin of the keys, in a few words.
        details: the origin of the keys, in detail.
        made_at: the time when the keys were made, in seconds since the epoch.
        pad: the remaining budget of a one-time pad; ``None`` without a pad.
    """

    def __init__(
        self,
        client: Client,
        basis: Callable[[], str],
        details: Callable[[], str],
        made_at: Callable[[], float],
        pad: Callable[[], PadBudget | None],
    ) -> None:
        self._client = client
        self._basis = basis
        self._details = details
        self._made_at = made_at
        self._pad = pad
        self._lines_in, self._lines = trio.open_memory_channel[str](0)

    async def run(self) -> None:
        """Run until the user leaves."""
        fancy = sys.stdin.isatty() and sys.stdout.isatty()
        async with trio.open_nursery() as outer:
            outer.start_soon(self._show)  # leaving ends the news
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._prompts if fancy else self._read_lines)
                try:
                    await self._obey()
                finally:
                    # In this order, so that a reader with a line to pass on is cancelled.
                    nursery.cancel_scope.cancel()
                    self._lines_in.close()

    # --- out ----------------------------------------------------------------------------------

    def status(self) -> str:
        """The status line."""
        client = self._client
        if client.online:
            age = max(0.0, time.time() - self._made_at())
            parts = [self._basis(), f"keys {age:.0f} s old (#{client.connections})"]
        else:
            parts = ["NOT CONNECTED"]
        pad = self._pad()
        if client.online and pad is not None:
            parts.append(left_of(pad))
        if client.unacknowledged:
            parts.append(f"{client.unacknowledged} unacknowledged")
        if client.trouble:
            parts.append(printable(client.trouble))
        return f"{client.nickname} in {client.room} | " + " | ".join(parts)

    async def _show(self) -> None:
        async for news in self._client.news:
            print(_shown(news), flush=True)

    # --- in -----------------------------------------------------------------------------------

    async def _obey(self) -> None:
        async for line in self._lines:
            if line.strip() in ("/quit", "/q"):
                break
            try:
                await self._do(line)
            except ChatError as error:
                print(f"! {error}", flush=True)
        await self._client.leave()

    async def _do(self, line: str) -> None:
        client = self._client
        text = printable(line).strip()
        if not text:
            return
        if text.startswith("//"):
            self._check_pad(text)
            await client.say(text[1:])
        elif not text.startswith("/"):
            self._check_pad(text)
            for start in range(0, len(text), MAX_TEXT):
                await client.say(text[start : start + MAX_TEXT])
        elif text.startswith("/join "):
            await client.join(text.removeprefix("/join ").strip())
        elif text in ("/who", "/rooms"):
            await client.ask(text[1:])
        elif text == "/keys":
            print(self._details(), flush=True)
        else:
            print(_HELP, flush=True)

    def _check_pad(self, text: str) -> None:
        """Refuse a text that needs more key than the pad has left, before any of it is sent."""
        pad = self._pad()
        if pad is None or pad.stock is None:
            return
        left = pad.sending + pad.stock
        actions = (
            Action(1, "say", text[at : at + MAX_TEXT]) for at in range(0, len(text), MAX_TEXT)
        )
        needed = sum(pad.cost(len(encode(one))) for one in (*self._client.outbox, *actions))
        if needed > left:
            raise ChatError(
                f"not sent: it takes {needed:,} bytes of QKD key, and {left:,} are left; wait for "
                "more, or say less"
            )

    async def _read_lines(self) -> None:
        """Read plain lines from a pipe or a file."""
        unread = b""
        while data := await trio.to_thread.run_sync(os.read, 0, 65536, abandon_on_cancel=True):
            *lines, unread = (unread + data).split(b"\n")
            for line in lines:
                await self._lines_in.send(line.decode("utf-8", "replace"))
        await self._lines_in.send("/quit")

    async def _prompts(self) -> None:
        try:
            from prompt_toolkit import PromptSession  # noqa: PLC0415  # an extra of its own
            from prompt_toolkit.patch_stdout import patch_stdout  # noqa: PLC0415
        except ModuleNotFoundError:
            print("the input line needs prompt_toolkit: pip install 'hybridkex[examples]'")
            await self._read_lines()
            return
        # The input history is kept in memory only.
        session = PromptSession[str](bottom_toolbar=self.status, refresh_interval=0.5)
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                try:
                    line = session.prompt("> ", handle_sigint=False)
                except (EOFError, KeyboardInterrupt):
                    line = "/quit"
                try:
                    trio.from_thread.run(self._lines_in.send, line)
                except (trio.RunFinishedError, trio.Cancelled, trio.ClosedResourceError):
                    return
                if line.strip() in ("/quit", "/q"):
                    return

        with patch_stdout():
            try:
                await trio.to_thread.run_sync(ask, abandon_on_cancel=True)
            finally:
                ended.set()
                if session.app.is_running and session.app.loop is not None:
                    session.app.loop.call_soon_threadsafe(
                        lambda: session.app.exit(exception=EOFError)
                    )


def _shown(news: Entry | Notice) -> str:
    """Format an event as one line without terminal control characters."""
    if isinstance(news, Notice):
        return f"* {printable(news.text)}"
    at = time.strftime("%H:%M", time.localtime(news.at))
    who, text = printable(news.nickname), printable(news.text)
    if news.kind == "said":
        return f"{at} <{who}> {text}"
    return f"{at} * {who} {printable(news.kind)} {printable(news.room)}"
