"""Tells systemd how a service is, by the protocol of sd_notify(3)."""

import os
import socket
import time

__all__ = ["notify", "notify_reloading"]


def notify(*fields: str) -> None:
    """Send ``KEY=value`` fields, if a service manager wants to hear any."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A leading @ stands for the zero byte of an abstract socket (unix(7)).
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(address)
            sender.sendall("\n".join(fields).encode())
        except OSError:
            # Nobody is there to be told, and that is no reason to stop.
            return


def notify_reloading() -> None:
    """A new configuration is being read; ``READY=1`` says when that is over."""
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify("RELOADING=1", f"MONOTONIC_USEC={microseconds}")
