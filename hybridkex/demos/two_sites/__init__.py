"""Two sites in one terminal: a QKD link, a KME at each end, and a file across.

Everything is what a user would run: the KMEs are ``kme serve``, the two parties ``listen`` and
``connect``, each a process of its own. Eve is a tap on the cable between them.
"""

from hybridkex.demos.two_sites.show import Demonstration

__all__ = ["Demonstration"]
