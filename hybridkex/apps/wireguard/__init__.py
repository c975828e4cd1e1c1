"""Rotation of the pre-shared key of a WireGuard tunnel.

WireGuard mixes a pre-shared key (PSK) into each of its handshakes. It protects recorded traffic
against a quantum computer, but WireGuard does not say where the key comes from. A
:class:`Rotator` at each end agrees on a fresh one with :func:`hybridkex.combiner.exchange`.
"""

from hybridkex.apps.wireguard.rotation import LABEL, RotationPolicy, Rotator
from hybridkex.apps.wireguard.tunnel import REJECT_AFTER, REKEY_AFTER, Tunnel

__all__ = ["LABEL", "REJECT_AFTER", "REKEY_AFTER", "RotationPolicy", "Rotator", "Tunnel"]
