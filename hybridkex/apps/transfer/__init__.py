"""Files over the channel: resumable, verified before they appear, in constant memory.

``docs/file-transfer.md`` has the protocol.
"""

from hybridkex.apps.transfer.folder import Folder
from hybridkex.apps.transfer.messages import PROTOCOL, ProtocolError
from hybridkex.apps.transfer.progress import Progress
from hybridkex.apps.transfer.receiver import Receiver
from hybridkex.apps.transfer.sender import Connect, ConnectionLost, Outcome, send_items
from hybridkex.apps.transfer.source import Item, collect, total_size

__all__ = [
    "PROTOCOL",
    "Connect",
    "ConnectionLost",
    "Folder",
    "Item",
    "Outcome",
    "Progress",
    "ProtocolError",
    "Receiver",
    "collect",
    "send_items",
    "total_size",
]
