"""An ETSI GS QKD 014 client and the key source on top of it."""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Final, Self
from urllib.parse import quote, unquote, urlsplit

from hybridkex.errors import (
    ConfigError,
    KeyConsumed,
    KeyExpired,
    KeyNotYetAvailable,
    KeySourceError,
    KeySourceExhausted,
    KeySourceUnavailable,
    KeyUnauthorized,
    KeyUnknown,
)
from hybridkex.fields import check_fields, checked
from hybridkex.json_text import load_json
from hybridkex.net.event_loop import time_limit
from hybridkex.net.log import BoundedLog
from hybridkex.qkd.etsi014 import models
from hybridkex.qkd.etsi014.mutual_tls import TlsHandshake, client_tls
from hybridkex.qkd.etsi014.naming import IdRule, id_of_certificate
from hybridkex.qkd.etsi014.transport import (
    HTTP_FAILURES,
    Answer,
    KmeTransport,
    check_url,
    refusal_of,
    what_failed,
)
from hybridkex.qkd.source import KeyPart, KeyReference, QkdKey, SourceStatus, single
from hybridkex.text import get_logger, printable

__all__ = ["Etsi014Source", "IdRule", "KmeAccess", "KmeClient", "classify"]

LOG: Final = get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class KmeAccess:
    """The settings by which an SAE reaches its KME. Files are PEM.

    Raises:
        ConfigError: the URL is not valid, or a limit is out of range.
    """

    url: str
    """``https://host:port``, without a path."""
    ca: Path
    """The authorities that may sign the KME's certificate."""
    certificate: Path
    """Our certificate; it shows the KME our SAE ID."""
    key: Path
    """The private key of our certificate."""
    kme_id: str | None = None
    """The ID that the KME's certificate must have; ``None``: any, if there is one."""
    kme_id_rule: IdRule = IdRule.COMMON_NAME
    """Which field of the KME's certificate is its ID."""
    tls: str = "stdlib"
    """``stdlib``, or ``hybridkex`` for a handshake that is post-quantum too."""
    timeout: float = 5.0
    """Seconds for one request from beginning to end."""
    max_answer: int = 1 << 20
    """The maximum length of a response in bytes, including headers."""
    always_post: bool = False
    """Use POST instead of GET, for a KME that lacks the GET forms and does not answer them with
    405."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_url(self.url)
        if self.timeout <= 0 or self.max_answer < 1024:
            raise ConfigError("timeout must be positive and max_answer at least 1024")


_SIGNS: Final[tuple[tuple[type[KeySourceError], re.Pattern[str]], ...]] = (
    (KeyExpired, re.compile(r"expired|time.to.live|\bttl\b")),
    (KeyConsumed, re.compile(r"consumed|already|replay|\bused\b")),
    (KeyNotYetAvailable, re.compile(r"not.yet|in.sync|synchroni[sz]")),
    (
        KeySourceExhausted,
        re.compile(r"exhaust|insufficient|not enough|too few|no (more )?keys?\b|empty|depleted"),
    ),
)
"""Phrases of KMEs about keys, for cases that the status does not distinguish."""

_OF_A_KEY: Final = (KeyExpired, KeyConsumed, KeyNotYetAvailable)
_BY_STATUS_ALONE: Final[dict[int, type[KeySourceError]]] = {
    401: KeyUnauthorized,
    403: KeyUnauthorized,
}
_BY_STATUS_OF_A_KEY: Final[dict[int, type[KeySourceError]]] = {
    404: KeyUnknown,
    409: KeyNotYetAvailable,
    410: KeyConsumed,
    425: KeyNotYetAvailable,
}


def classify(status: int, message: str, *, looking_up: bool) -> KeySourceError:
    """The typed error for a ``status`` other than 200, including those of KMEs that deviate from
    the standard.

    ``looking_up``: the request named keys (dec_keys). The standard has only 400, 401 and 503, and
    one message for all missing keys; deployed KMEs use other statuses and messages, too.
    """
    shown = printable(message, most=200)
    text = f"the KME answered {status}: {shown}" if shown else f"the KME answered {status}"
    if status == 401:
        # The standard's status for a wrong SAE, independent of the text.
        return KeyUnauthorized(f"{text}; our certificate is not one of an SAE of this KME")
    if "sae" in message.lower() and not looking_up:
        text += "; check the peer's SAE ID"
    elif status == 503 and not looking_up:
        text += "; no key may be ready: try again later"
    elif status in (502, 504):
        text += ", as a proxy does whose KME is down"
    for kind, pattern in _SIGNS:
        if (kind in _OF_A_KEY) == looking_up and pattern.search(message.lower()):
            return kind(text)
    if looking_up and status in _BY_STATUS_OF_A_KEY:
        return _BY_STATUS_OF_A_KEY[status](text)
    if status in _BY_STATUS_ALONE:
        return _BY_STATUS_ALONE[status](text)
    if looking_up and status == 400 and re.search(r"not found|unknown|not available", message):
        return KeyUnknown(text)
    return KeySourceUnavailable(text)


class KmeClient:
    """The three calls of ETSI GS QKD 014, for one SAE and its KME.

    Each call takes at most ``access.timeout`` seconds and raises a
    :class:`~hybridkex.errors.KeySourceError` for every way in which it can fail. No request is sent
    twice: if a response to enc_keys or dec_keys is lost, its keys are lost (the standard has no way
    to request them again), and only the caller knows whether to use new ones.
    """

    @checked
    def __init__(self, access: KmeAccess, *, handshake: TlsHandshake | None = None) -> None:
        """Read the certificates; sends nothing. ``handshake`` replaces ``access.tls``.

        Raises ``ConfigError``.
        """
        self._access = access
        self._kme_id = access.kme_id
        self._post = access.always_post
        self._slash = ""  # a trailing slash, if this KME wants one
        self._lines = BoundedLog(LOG)  # a peer may name keys that the KME does not have
        handshake = handshake or client_tls(
            access.tls, ca=access.ca, certificate=access.certificate, key=access.key
        )
        self._http = KmeTransport(
            access.url, handshake, self._confirm, max_answer=access.max_answer
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def kme_id(self) -> str | None:
        """The KME's ID: configured, or else what its certificate said on the first connection."""
        return self._kme_id

    def _confirm(self, certificate: bytes) -> None:
        """Clause 5.1: the SAE must confirm the KME ID from the certificate before it continues."""
        found = id_of_certificate(certificate, self._access.kme_id_rule)
        if found is None:
            rule = self._access.kme_id_rule.value
            raise KeySourceUnavailable(f"the KME's certificate has no ID by the rule {rule}")
        if self._kme_id is None:
            self._kme_id = found
        elif found != self._kme_id:
            raise KeySourceUnavailable(f"the KME is {found}, not {self._kme_id}")

    async def status(self, slave_sae: str) -> models.Status:
        """Get status for the peer ``slave_sae`` (clause 5.1).

        Raises:
            KeySourceError: the KME did not answer, refused, or its answer is malformed.
        """
        body = await self._call(slave_sae, "status")
        try:
            status = models.Status.from_json(body)
        except models.ModelError as error:
            raise KeySourceUnavailable(f"the KME's status is malformed: {error}") from None
        if self._access.kme_id is None and status.source_kme_id != self._kme_id:
            # A configured ID that the certificate confirmed takes precedence over this one.
            raise KeySourceUnavailable(
                f"the KME's status has the ID {status.source_kme_id}, and its certificate "
                f"{self._kme_id}; if that is the right KME, configure its ID (--kme-id "
                f"{self._kme_id})"
            )
        return status

    async def enc_keys(
        self, slave_sae: str, request: models.KeyRequest | None = None
    ) -> models.KeyContainer:
        """Get key (clause 5.2): new keys, ``request.size`` bits each, with us as master and
        ``slave_sae`` as slave.

        Raises what :meth:`KeySource.get_key` raises. Number and length of the keys are checked.
        """
        request = request or models.KeyRequest()
        longest = 4096 + request.number * (512 + (request.size or 0) // 6)
        if longest > self._access.max_answer:
            # If requested but too long to read, the keys would be lost.
            raise ConfigError(
                f"an answer with {request.number} keys may have {longest} bytes, and max_answer is "
                f"{self._access.max_answer}"
            )
        content = request.to_json()  # of a simple one, the query
        query = content if request.simple and not self._post else None
        body = await self._call(slave_sae, "enc_keys", query, content)
        container = self._container(body, request.number)
        if request.size is not None and any(
            len(item.key) * 8 != request.size for item in container.keys
        ):
            raise KeySourceUnavailable("the KME returned keys of a different length than requested")
        return container

    async def dec_keys(self, master_sae: str, key_ids: Sequence[str]) -> models.KeyContainer:
        """Get key with key IDs (clause 5.3), which ``master_sae`` drew, in the order of
        ``key_ids``.

        Raises:
            KeySourceError: what :meth:`KeySource.get_key_with_id` raises.
        """
        content = models.KeyIds(key_ids=tuple(key_ids)).to_json()
        query = {"key_ID": key_ids[0]} if len(key_ids) == 1 and not self._post else None
        body = await self._call(master_sae, "dec_keys", query, content)
        container = self._container(body, len(key_ids))
        found: dict[str, models.DeliveredKey] = {item.key_id: item for item in container.keys}
        if found.keys() != set(key_ids):
            raise KeySourceUnavailable("the KME returned different keys than requested")
        return models.KeyContainer(
            keys=tuple(found[key_id] for key_id in key_ids),
            key_container_extension=container.key_container_extension,
        )

    @staticmethod
    def _container(body: object, number: int) -> models.KeyContainer:
        try:
            container = models.KeyContainer.from_json(body)
        except models.ModelError as error:
            raise KeySourceUnavailable(f"the KME's keys are malformed: {error}") from None
        if len(container.keys) != number:
            raise KeySourceUnavailable(
                f"the KME returned {len(container.keys)} keys, and {number} were requested"
            )
        if len({item.key_id for item in container.keys}) != number:
            raise KeySourceUnavailable("the KME returned the same key ID twice")
        if any(len(item.key) == 0 for item in container.keys):
            raise KeySourceUnavailable("the KME returned an empty key")
        return container

    async def _call(
        self,
        sae: str,
        call: str,
        query: dict[str, Any] | None = None,
        content: models.Json | None = None,
    ) -> object:
        """Make one request: a GET, or a POST where there is ``content`` and no ``query``. Errors
        name the KME, never a key.

        A request is sent again only where the answer says that nothing was done: a redirect that
        adds the slash at the end, and 405 for a GET that has a POST form.
        """
        path = f"{models.API}/{quote(sae, safe='')}/{call}"
        method = "GET" if query is not None or content is None else "POST"
        try:
            async with time_limit(self._access.timeout):
                answer = await self._exchange(method, path, query, content)
                if not self._slash and _adds_a_slash(answer, self._access.url, path):
                    self._slash = "/"
                    answer = await self._exchange(method, path, query, content)
                if answer.status == 405 and method == "GET" and content is not None:
                    self._post = True
                    answer = await self._exchange("POST", path, query, content)
        except TimeoutError:
            raise KeySourceUnavailable(
                f"the KME at {self._access.url} did not answer within "
                f"{self._access.timeout:g} s ({call})"
            ) from None
        except HTTP_FAILURES as error:
            refusal = refusal_of(error)
            if refusal is not None:
                raise KeyUnauthorized(
                    f"the KME refused our certificate ({refusal}): it must be valid now "
                    "and issued by an authority that the KME trusts"
                ) from None
            raise KeySourceUnavailable(
                f"the KME at {self._access.url} {what_failed(error)}"
            ) from None
        try:
            value = load_json(answer.body)
        except ValueError:
            # The decoder's error would contain the body, and so a key.
            if answer.status == 200:
                raise KeySourceUnavailable(f"{call}: the KME's answer is not JSON") from None
            value = None  # such as a proxy's HTML
        if answer.status == 200:
            return value
        target = answer.headers.get("Location")
        if target and 300 <= answer.status < 400:
            raise KeySourceUnavailable(
                f"the KME answered {answer.status}, a redirect to {printable(target, most=200)}, "
                "which is not followed; configure the URL of the KME itself"
            )
        refused = classify(answer.status, models.message_of(value), looking_up=call == "dec_keys")
        refused.retry_after = _retry_after(answer)
        self._lines.log(logging.INFO, "%s: %s", call, refused)
        raise refused

    async def _exchange(
        self, method: str, path: str, query: dict[str, Any] | None, content: models.Json | None
    ) -> Answer:
        return await self._http.exchange(
            method,
            path + self._slash,
            query=query if method == "GET" else None,
            content=content if method == "POST" else None,
        )


def _adds_a_slash(answer: Answer, url: str, path: str) -> bool:
    """Whether this is a redirect to the same URL with a slash at its end, and to nowhere else."""
    if answer.status not in (301, 302, 307, 308):
        return False
    try:
        location = urlsplit(answer.headers.get("Location", ""))
    except ValueError:
        return False
    if unquote(location.path) != f"{unquote(path)}/":
        return False
    return not location.netloc or (location.scheme, location.netloc) == urlsplit(url)[:2]


MOST_RETRY_AFTER: Final = 3600.0
"""The longest wait in seconds that an answer can impose."""


def _retry_after(answer: Answer) -> float | None:
    """The seconds of a Retry-After (RFC 9110 section 10.2.3), bounded; ``None`` without one."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        seconds = float(text[:9])
    else:
        try:
            seconds = (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds()
        except (ArithmeticError, LookupError, TypeError, ValueError):
            return None  # raised by email.utils and datetime for impossible dates
    return min(max(seconds, 0.0), MOST_RETRY_AFTER)


class Etsi014Source:
    """A :class:`~hybridkex.qkd.source.KeySource` at a KME, for one peer.

    Several sources can share a client. The KME at the peer's site is learned from the status, once.
    For a KME whose status hides it, give it as ``peer_kme``: both sites must use the same names.

    Args:
        client: the connection to our KME.
        sae: our SAE ID.
        peer_sae: the peer's SAE ID.
        peer_kme: the KME at the peer's site; ``None``: as the status says.
        key_bits: bits of each key, a multiple of 8, 128 or more.

    Raises:
        ConfigError: the IDs are empty or equal, or ``key_bits`` is out of range.
    """

    @checked
    def __init__(
        self,
        client: KmeClient,
        *,
        sae: str,
        peer_sae: str,
        peer_kme: str | None = None,
        key_bits: int = 256,
    ) -> None:
        if not sae or not peer_sae or sae == peer_sae:
            raise ConfigError("a key source needs two different SAE IDs")
        if key_bits < 128 or key_bits % 8:
            raise ConfigError("key_bits must be a multiple of 8 and at least 128")
        self.local_sae: Final = sae
        self.peer_sae: Final = peer_sae
        self._client = client
        self._peer_kme_given: Final = peer_kme
        self._peer_kme = peer_kme
        self._key_bits = key_bits

    async def get_key(self) -> QkdKey:
        """Get a fresh key; see :class:`~hybridkex.qkd.source.KeySource`."""
        kme, peer_kme = await self._kmes()
        request = models.KeyRequest(number=1, size=self._key_bits)
        [item] = (await self._client.enc_keys(self.peer_sae, request)).keys
        return QkdKey(
            name=(KeyPart(kme, peer_kme, item.key_id),),
            master_sae=self.local_sae,
            slave_sae=self.peer_sae,
            key=item.key,
        )

    async def get_key_with_id(self, name: KeyReference) -> QkdKey:
        """Get the key that the peer drew; see :class:`~hybridkex.qkd.source.KeySource`."""
        kme, peer_kme = await self._kmes()
        key_id = single(name, master_kme=peer_kme, slave_kme=kme)
        [item] = (await self._client.dec_keys(self.peer_sae, [key_id])).keys
        if len(item.key) * 8 != self._key_bits:
            raise KeySourceUnavailable(
                "the KME returned a key of a different length than configured"
            )
        return QkdKey(name=name, master_sae=self.peer_sae, slave_sae=self.local_sae, key=item.key)

    def knows(self, name: KeyReference) -> bool:
        """Whether the KMEs named are those of this source. No I/O."""
        try:
            single(name, master_kme=self._peer_kme, slave_kme=self._client.kme_id)
        except KeyUnknown:
            return False
        return True

    async def status(self) -> SourceStatus:
        """The stock; draws no key."""
        status = await self._status()
        return SourceStatus(
            stored=status.stored_key_count,
            capacity=status.max_key_count,
            key_bits=self._key_bits,
        )

    async def _kmes(self) -> tuple[str, str]:
        ours, theirs = self._client.kme_id, self._peer_kme
        if ours is None or theirs is None:
            status = await self._status()
            ours = self._client.kme_id or status.source_kme_id
            theirs = self._peer_kme or status.target_kme_id
        return ours, theirs

    async def _status(self) -> models.Status:
        status = await self._client.status(self.peer_sae)
        if status.master_sae_id != self.local_sae:
            raise KeyUnauthorized(
                f"the KME identifies us as {status.master_sae_id}, not as {self.local_sae}"
            )
        if self._peer_kme_given is not None:
            return status  # some KMEs hide the real ID
        if self._peer_kme is None:
            self._peer_kme = status.target_kme_id
        elif self._peer_kme != status.target_kme_id:
            raise KeySourceUnavailable(
                f"the KME of {self.peer_sae} is {status.target_kme_id} now, and was "
                f"{self._peer_kme}"
            )
        return status
