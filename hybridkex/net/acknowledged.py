"""The bytes that a TCP socket has sent and the other system has not acknowledged."""

import socket
import sys
from typing import Any

if sys.platform == "linux":
    import fcntl
    import termios


def unacknowledged(sock: Any) -> int:
    """Bytes in the send queue of a TCP socket.

    The result is 0 for any other socket, for a closed one, and on systems other than Linux
    (``SIOCOUTQ``, tcp(7)).
    """
    if sys.platform != "linux" or sock.family not in (socket.AF_INET, socket.AF_INET6):
        return 0
    descriptor = sock.fileno()
    if descriptor < 0:
        return 0
    try:
        answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    return int.from_bytes(answer, sys.byteorder)
