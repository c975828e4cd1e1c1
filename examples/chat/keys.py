"""The origin of a session's keys, in a few words for a status line."""

import ipaddress

import trio

from hybridkex import PadBudget, Session

__all__ = ["left_of", "made_at", "network_of", "owner_of", "rests_on", "spent_of"]


def left_of(pad: PadBudget) -> str:
    """Describe how long a message may be, and how much more key the KME has."""
    more = "" if pad.stock is None else f" + {pad.stock:,} at the KME"
    return f"one-time pad for {pad.message:,} bytes{more}"


def spent_of(pad: PadBudget) -> str:
    """Describe the remaining and the used key."""
    return f"{left_of(pad)}; {pad.sent:,} bytes of key sent, {pad.received:,} received"


def owner_of(session: Session) -> str:
    """Return the peer's vouched names, or else its key, or else an empty string.

    The subject of a certificate is not used: the owner of a pinned key can write any name there.
    """
    if session.vouched_names:
        return ", ".join(session.vouched_names)
    shown = session.peer_credential
    return f"sha256:{shown.pin}" if shown is not None else ""


def network_of(stream: trio.SocketStream) -> str:
    """Return the client's IPv4 address, or the /64 network of its IPv6 address, in which one host
    can have any number of addresses."""
    host = ipaddress.ip_address(stream.socket.getpeername()[0].partition("%")[0])
    if isinstance(host, ipaddress.IPv6Address):
        if host.ipv4_mapped is None:
            return str(ipaddress.ip_network((host, 64), strict=False))
        host = host.ipv4_mapped
    return str(host)


def rests_on(session: Session) -> str:
    """Describe the legs, the authentication of the peer, and the number of key renewals."""
    legs = list(session.parts)
    last = session.epochs[-1] if session.epochs else None
    key_ids = session.qkd_key_ids if last is None else last.qkd_key_ids
    if key_ids:
        legs.append(f"QKD {', '.join(key_id[:8] for key_id in key_ids)}")
    elif session.psk_identity is not None and not session.qkd_key_ids:
        legs.append("PSK")
    text = f"{' + '.join(legs)}, by {session.authenticated_by.value}"
    if last is not None:
        text += f", renewed {last.number} times"
    missing = session.qkd_fallback if last is None else last.qkd_missing
    return f"{text}, NO QKD KEY" if missing is not None else text


def made_at(session: Session) -> float:
    """Return the time when the current keys were made, in seconds since the epoch."""
    return session.epochs[-1].began_at if session.epochs else session.began_at
