"""Reports a service's state to systemd by the protocol of sd_notify(3)."""

import os
import socket
import time


def notify(*fields: str) -> None:
    """Send ``KEY=value`` fields, if a service manager listens."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    # A leading @ denotes the zero byte of an abstract socket (unix(7)).
    address = "\0" + path[1:] if path.startswith("@") else path
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
        try:
            sender.connect(address)
            sender.sendall("\n".join(fields).encode())
        except OSError:
            # Without a listener the service goes on.
            return


def notify_reloading() -> None:
    """Report that a reload has begun; ``READY=1`` reports its end."""
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify("RELOADING=1", f"MONOTONIC_USEC={microseconds}")
