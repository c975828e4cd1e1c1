"""Two sites in one terminal: a QKD link, a KME at each end, and a file transfer.

It runs the commands that a user would run: ``kme serve`` for the KMEs, ``listen`` and ``connect``
for the parties, each in its own process. Eve is a tap on the connection.
"""

from hybridkex.demos.two_sites.show import Demonstration

__all__ = ["Demonstration"]
