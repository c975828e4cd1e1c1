"""A client of TLS 1.3 with fresh keys and one-time pads, written from the documentation alone.

From docs/fresh-keys.md, docs/one-time-pad.md and docs/qkd-handshake.md, and RFC 9846: nothing here
comes from the library. One suite (TLS_AES_128_GCM_SHA256), one group (X25519MLKEM768), blocking
sockets. Certificates are not verified.
"""

import hashlib
import hmac
import os
import socket
from collections.abc import Callable, Iterator

from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey, MLKEM768PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.poly1305 import Poly1305

Parts = list[tuple[str, str, str]]
"""Of a key's name: the master's KME, the slave's KME, the key ID."""

HASH = 32
ZEROS = bytes(HASH)
GROUP = b"\x11\xec"
SUITE = b"\x13\x01"
ALERT, HANDSHAKE, DATA, PAD_RECORD = 21, 22, 23, 224
CLIENT_HELLO, SERVER_HELLO, ENCRYPTED_EXTENSIONS, FINISHED, UPDATE = 1, 2, 8, 20, 240
REQUEST, RESPONSE, FINISH = 0, 1, 2
FRESH_REQUEST, FRESH_RESPONSE, FRESH_DECLINE, FRESH_CONFIRM, PAD_KEY = 224, 225, 226, 227, 228
EMPTY, USED, NOT_FOUND = 0, 1, 2
PRE_SHARED_KEY, TLS_FLAGS, FRESH_QKD_KEYS, ONE_TIME_PAD = 41, 0xFF3E, 0xFF3F, 0xFF40
CLOSE_NOTIFY = b"\x01\x00"


class AlertReceived(Exception):
    """The server has sent a fatal alert."""


def vector(size: int, data: bytes) -> bytes:
    return len(data).to_bytes(size, "big") + data


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def mac(key: bytes, data: bytes) -> bytes:
    return hmac.digest(key, data, "sha256")


def expand_label(secret: bytes, label: bytes, context: bytes, size: int = HASH) -> bytes:
    """HKDF-Expand-Label, for one block of the hash."""
    info = size.to_bytes(2, "big") + vector(1, b"tls13 " + label) + vector(1, context)
    return mac(secret, info + b"\x01")[:size]


def salt_of(secret: bytes) -> bytes:
    return expand_label(secret, b"derived", digest(b""))


def finished(secret: bytes, transcript: bytes) -> bytes:
    return mac(expand_label(secret, b"finished", b""), transcript)


def key_share(share: bytes) -> bytes:
    return GROUP + vector(2, share)


def extension(code: int, data: bytes) -> bytes:
    return code.to_bytes(2, "big") + vector(2, data)


def message(kind: int, body: bytes) -> bytes:
    return bytes((kind,)) + vector(3, body)


def update(subtype: int, body: bytes = b"") -> bytes:
    return message(UPDATE, bytes((subtype,)) + body)


def texts(*values: str) -> bytes:
    return b"".join(vector(1, value.encode()) for value in values)


def qkd_identity(parts: Parts) -> bytes:
    return b"hkx-qkd\x01" + vector(2, b"".join(texts(*part) for part in parts))


def parts_of(identity: bytes) -> Parts:
    rest, found = identity[len(b"hkx-qkd\x01") + 2 :], list[str]()
    while rest:
        found.append(rest[1 : 1 + rest[0]].decode())
        rest = rest[1 + rest[0] :]
    return list(zip(found[::3], found[1::3], found[2::3], strict=True))


def imported_identity(head: bytes, parts: Parts, master: str, slave: str) -> bytes:
    """``head``: the context up to the SAE IDs."""
    kmes = b"".join(texts(*part[:2]) for part in parts)
    context = head + texts(master, slave) + vector(2, kmes)
    return vector(2, qkd_identity(parts)) + vector(2, context) + b"\x03\x04" + b"\x00\x01"


def imported_key(key: bytes, identity: bytes) -> bytes:
    return expand_label(mac(ZEROS, key), b"derived psk", digest(identity))


class Exchange:
    """The client's half of X25519MLKEM768."""

    def __init__(self) -> None:
        self._ecdh, self._kem = X25519PrivateKey.generate(), MLKEM768PrivateKey.generate()
        ours = self._ecdh.public_key().public_bytes_raw()
        self.share = self._kem.public_key().public_bytes_raw() + ours

    def finish(self, share: bytes) -> bytes:
        ciphertext, theirs = share[:1088], X25519PublicKey.from_public_bytes(share[1088:])
        return self._kem.decapsulate(ciphertext) + self._ecdh.exchange(theirs)


def respond(share: bytes) -> tuple[bytes, bytes]:
    """The other half: our share, and the secret."""
    ecdh = X25519PrivateKey.generate()
    secret, ciphertext = MLKEM768PublicKey.from_public_bytes(share[:1184]).encapsulate()
    theirs = X25519PublicKey.from_public_bytes(share[1184:])
    return ciphertext + ecdh.public_key().public_bytes_raw(), secret + ecdh.exchange(theirs)


class Protection:
    """The key of one direction."""

    def __init__(self, secret: bytes) -> None:
        self.secret = secret
        self._aead = AESGCM(expand_label(secret, b"key", b"", 16))
        self._iv = int.from_bytes(expand_label(secret, b"iv", b"", 12), "big")
        self._number = 0

    def _nonce(self) -> bytes:
        nonce = (self._iv ^ self._number).to_bytes(12, "big")
        self._number += 1
        return nonce

    def seal(self, kind: int, content: bytes) -> bytes:
        header = b"\x17\x03\x03" + (len(content) + 17).to_bytes(2, "big")
        return header + self._aead.encrypt(self._nonce(), content + bytes((kind,)), header)

    def open(self, header: bytes, fragment: bytes) -> tuple[int, bytes]:
        inner = self._aead.decrypt(self._nonce(), fragment, header).rstrip(b"\x00")
        return inner[-1], inner[:-1]


class Pad:
    """The one-time pad of one direction."""

    def __init__(self) -> None:
        self.keys = b""
        self._point = b""
        self._number = 0

    @property
    def begun(self) -> bool:
        return bool(self._point)

    def _take(self, size: int) -> bytes:
        assert len(self.keys) >= size, "the pad is too short"
        taken, self.keys = self.keys[:size], self.keys[size:]
        return taken

    def _xor(self, data: bytes) -> bytes:
        self._point = self._point or self._take(16)
        mask = self._take(len(data))
        return bytes(one ^ other for one, other in zip(data, mask, strict=True))

    def _tag(self, hidden: bytes) -> bytes:
        key, number = self._point + self._take(16), self._number.to_bytes(8, "big")
        self._number += 1
        return Poly1305.generate_tag(key, number + hidden)

    def seal(self, kind: int, content: bytes) -> bytes:
        hidden = self._xor(content + bytes((kind,)))
        return hidden + self._tag(hidden)

    def open(self, sealed: bytes) -> tuple[int, bytes]:
        hidden = sealed[:-16]
        plain = self._xor(hidden)
        assert self._tag(hidden) == sealed[-16:], "not authentic"
        return plain[-1], plain[:-1]


class Client:
    """One session, from its ClientHello on.

    Args:
        tcp: the connection.
        saes: our SAE ID and the server's.
        draw: gives the name and the bytes of a new QKD key.
        look_up: gives the bytes of a key that the server has drawn, or ``None``.
        psk: whether a QKD key goes into the handshake; else the server shows a certificate.
        slot: whether ``fresh_qkd_keys`` is offered; else the draft alone.
        pad: whether ``one_time_pad`` is offered.
    """

    def __init__(
        self,
        tcp: socket.socket,
        saes: tuple[str, str],
        draw: Callable[[], tuple[Parts, bytes]],
        look_up: Callable[[Parts], bytes | None],
        *,
        psk: bool = True,
        slot: bool = True,
        pad: bool = False,
    ) -> None:
        self._tcp, self._saes, self._draw, self._look_up = tcp, saes, draw, look_up
        self._slot = slot
        self._reading: Protection | None = None
        self._writing: Protection | None = None
        self._bytes = b""
        self._messages = b""
        self.pads = (Pad(), Pad()) if pad else None
        """What we send, and what the server sends."""
        self.received = b""
        self.ended = False
        self.epoch = 0
        self.log: list[str] = []
        """What became of the updates."""
        self._request: tuple[bytes, Exchange, bytes] | None = None
        """What we have sent, and the imported key in it."""
        self._next_reading: bytes | None = None
        self._confirmation_due = self._closed = False
        self._how = ""
        self._handshake(psk)

    @property
    def under_way(self) -> bool:
        waits = self._request is not None or self._next_reading is not None
        return waits or self._confirmation_due

    # --- records ------------------------------------------------------------------------------

    def write(self, kind: int, content: bytes) -> None:
        if self._writing is None:
            record = bytes((kind,)) + b"\x03\x03" + vector(2, content)
        else:
            record = self._writing.seal(kind, content)
        self._tcp.sendall(record)

    def _exactly(self, size: int) -> bytes:
        while len(self._bytes) < size:
            more = self._tcp.recv(65536)
            if not more:
                raise EOFError
            self._bytes += more
        taken, self._bytes = self._bytes[:size], self._bytes[size:]
        return taken

    def _record(self) -> tuple[int, bytes]:
        header = self._exactly(5)
        fragment = self._exactly(int.from_bytes(header[3:], "big"))
        if self._reading is None or header[0] != DATA:
            return header[0], fragment
        return self._reading.open(header, fragment)

    def _split(self, content: bytes) -> Iterator[bytes]:
        """The whole messages that there are."""
        self._messages += content
        while len(self._messages) >= 4:
            size = 4 + int.from_bytes(self._messages[1:4], "big")
            if len(self._messages) < size:
                return
            taken, self._messages = self._messages[:size], self._messages[size:]
            yield taken

    def _handshake_messages(self) -> Iterator[bytes]:
        while True:
            kind, content = self._record()
            if kind == ALERT:
                raise AlertReceived(content[1])
            if kind == HANDSHAKE:
                yield from self._split(content)

    # --- the handshake ------------------------------------------------------------------------

    def _hello(self, exchange: Exchange, psk: bool) -> tuple[bytes, bytes]:
        """The ClientHello, and the Early Secret."""
        extensions = (
            extension(43, vector(1, b"\x03\x04"))
            + extension(10, vector(2, GROUP))
            + extension(13, vector(2, b"\x04\x03\x08\x04\x08\x07"))
            + extension(51, vector(2, key_share(exchange.share)))
            + extension(45, vector(1, b"\x01"))
            + extension(TLS_FLAGS, vector(1, bytes(8) + b"\x01"))
        )
        if self._slot:
            extensions += extension(FRESH_QKD_KEYS, vector(1, b"\x01"))
        if self.pads is not None:
            extensions += extension(ONE_TIME_PAD, vector(1, b"\xff\x01"))
        fixed = b"\x03\x03" + os.urandom(32) + vector(1, b"") + vector(2, SUITE) + vector(1, b"\0")
        if not psk:
            return message(CLIENT_HELLO, fixed + vector(2, extensions)), mac(ZEROS, ZEROS)
        parts, key = self._draw()
        identity = imported_identity(b"hkx-qkd ctx\x01", parts, *self._saes)
        early = mac(ZEROS, imported_key(key, identity))
        binders = vector(2, vector(1, ZEROS))
        offer = vector(2, vector(2, identity) + bytes(4)) + binders
        extensions += extension(PRE_SHARED_KEY, offer)
        hello = message(CLIENT_HELLO, fixed + vector(2, extensions))[: -len(binders)]
        binder = finished(expand_label(early, b"imp binder", digest(b"")), digest(hello))
        return hello + vector(2, vector(1, binder)), early

    def _handshake(self, psk: bool) -> None:
        exchange = Exchange()
        transcript, early = self._hello(exchange, psk)
        self.write(HANDSHAKE, transcript)
        messages = self._handshake_messages()
        hello = next(messages)
        assert hello[0] == SERVER_HELLO
        at = hello.index(b"\x00\x33\x04\x64" + GROUP) + 8  # key_share with 1,120 bytes
        handshake = mac(salt_of(early), exchange.finish(hello[at : at + 1120]))
        transcript += hello
        theirs = expand_label(handshake, b"s hs traffic", digest(transcript))
        ours = expand_label(handshake, b"c hs traffic", digest(transcript))
        self._reading, self._writing = Protection(theirs), Protection(ours)
        for one in messages:
            if one[0] == FINISHED:
                assert one[4:] == finished(theirs, digest(transcript))
                transcript += one
                break
            transcript += one
        main = mac(salt_of(handshake), ZEROS)
        client = expand_label(main, b"c ap traffic", digest(transcript))
        server = expand_label(main, b"s ap traffic", digest(transcript))
        last = message(FINISHED, finished(ours, digest(transcript)))
        self.write(HANDSHAKE, last)
        self._reading, self._writing = Protection(server), Protection(client)
        self._salt, self._transcript = salt_of(main), digest(transcript + last)

    # --- key updates --------------------------------------------------------------------------

    def start_update(self) -> None:
        exchange, key, body = Exchange(), ZEROS, b""
        if self._slot:
            parts, drawn = self._draw()
            head = b"hkx-qkd upd\x01\x00" + (self.epoch + 1).to_bytes(8, "big")
            identity = imported_identity(head, parts, *self._saes)
            key, body = imported_key(drawn, identity), b"\x01" + vector(2, identity)
        subtype = FRESH_REQUEST if self._slot else REQUEST
        request = update(subtype, key_share(exchange.share) + body)
        self._request = request, exchange, key
        self.write(HANDSHAKE, request)

    def _derive(self, request: bytes, response: bytes, shared: bytes, key: bytes) -> list[bytes]:
        """The traffic secrets of the next epoch: the client's and the server's."""
        self._transcript = digest(self._transcript + request + response)
        if self._slot:
            self._salt = salt_of(mac(self._salt, key))
        main = mac(self._salt, shared)
        self._salt = salt_of(main)
        labels = (b"c ap traffic", b"s ap traffic")
        return [expand_label(main, label, self._transcript) for label in labels]

    def _change_sending(self, secret: bytes) -> None:
        self._writing = Protection(secret)
        if self._slot:
            self.write(HANDSHAKE, update(FRESH_CONFIRM, finished(secret, self._transcript)))
            self._confirmation_due = True

    def _complete(self) -> None:
        self.epoch += 1
        self.log.append(self._how)

    def handle(self, raw: bytes) -> None:
        """One message after the handshake."""
        subtype, body = raw[4], raw[5:]
        assert raw[0] == UPDATE
        if subtype in (REQUEST, FRESH_REQUEST):
            self._requested(raw, body)
        elif subtype in (RESPONSE, FRESH_RESPONSE):
            self._answered(raw, body)
        elif subtype == FINISH:
            assert self._next_reading is not None
            self._reading, self._next_reading = Protection(self._next_reading), None
            if not self._slot:
                self._complete()
        elif subtype == FRESH_CONFIRM:
            assert self._reading is not None
            assert body == finished(self._reading.secret, self._transcript)
            self._confirmation_due = False
            self._complete()
        elif subtype == FRESH_DECLINE:
            self._request = None
            self.log.append("declined")
        else:
            assert subtype == PAD_KEY
            assert self.pads is not None
            key = self._look_up(parts_of(body[2:]))
            assert key is not None
            self.pads[1].keys += key

    def _requested(self, raw: bytes, body: bytes) -> None:
        share, rest = body[4:1220], body[1220:]
        if self._request is not None:
            if share < self._request[1].share:
                return  # theirs is ignored
            self._request = None
        key, answer = ZEROS, b""
        if self._slot:
            answer, identity = bytes((EMPTY,)), rest[3:]
            if identity:
                parts = parts_of(identity[2 : 2 + int.from_bytes(identity[:2], "big")])
                head = b"hkx-qkd upd\x01\x01" + (self.epoch + 1).to_bytes(8, "big")
                assert identity == imported_identity(head, parts, *reversed(self._saes))
                found = self._look_up(parts)
                assert found is not None
                key, answer = imported_key(found, identity), bytes((USED,))
        ours, shared = respond(share)
        subtype = FRESH_RESPONSE if self._slot else RESPONSE
        response = update(subtype, key_share(ours) + answer)
        self.write(HANDSHAKE, response)
        client, self._next_reading = self._derive(raw, response, shared, key)
        self._how = "theirs"
        self._change_sending(client)

    def _answered(self, raw: bytes, body: bytes) -> None:
        assert self._request is not None
        request, exchange, key = self._request
        self._request = None
        key = key if self._slot and body[1124] == USED else ZEROS
        client, server = self._derive(request, raw, exchange.finish(body[4:1124]), key)
        self._reading = Protection(server)
        self.write(HANDSHAKE, update(FINISH))
        self._how = "ours"
        self._change_sending(client)
        if not self._slot:
            self._complete()

    # --- data ---------------------------------------------------------------------------------

    def send(self, data: bytes) -> None:
        if self.pads is None:
            self.write(DATA, data)
            return
        pad = self.pads[0]
        while len(pad.keys) < len(data) + 16 + 17 + 38:
            parts, key = self._draw()
            pad.keys += key
            self.write(HANDSHAKE, update(PAD_KEY, vector(2, qkd_identity(parts))))
        self.write(PAD_RECORD, pad.seal(DATA, data))

    def close(self) -> None:
        self._closed = True
        if self.pads is not None and self.pads[0].begun:
            self.write(PAD_RECORD, self.pads[0].seal(ALERT, CLOSE_NOTIFY))
        else:
            self.write(ALERT, CLOSE_NOTIFY)

    def receive_until(self, done: Callable[[], bool]) -> None:
        while not done():
            kind, content = self._record()
            if kind == PAD_RECORD:
                assert self.pads is not None
                kind, content = self.pads[1].open(content)
            if kind == HANDSHAKE and not self._closed:  # or nothing may follow our close_notify
                for one in self._split(content):
                    self.handle(one)
            elif kind == ALERT and content != CLOSE_NOTIFY:
                raise AlertReceived(content[1])
            elif kind == ALERT:
                self.ended = True
            else:
                self.received += content
