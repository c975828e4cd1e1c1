"""Odd requests and what becomes of them: for every server of HTTP, and for the fuzzer's seeds.

The server that they are for has ``/thing``, which answers GET and HEAD, and POST with the JSON body
that came, and ``/boom``, which fails. Its bodies have at most 1,000 bytes, its headers 2,000.
"""

from typing import NamedTuple

HOST = b"Host: kme\r\n"
GET = b"GET /thing HTTP/1.1\r\n" + HOST
POST = b"POST /thing HTTP/1.1\r\n" + HOST


class Case(NamedTuple):
    """What a client sends, and the status codes of the answers that are right."""

    name: str
    sent: bytes
    statuses: tuple[int, ...]
    """In order. 0: any one that refuses (400 to 499, or 501 and 505)."""
    closes: bool = False
    """The server ends the connection by itself."""


def post(body: bytes, *headers: bytes) -> bytes:
    length = b"Content-Length: %d" % len(body)
    return POST + b"\r\n".join([length, *headers]) + b"\r\n\r\n" + body


def chunked(raw: bytes) -> bytes:
    return POST + b"Transfer-Encoding: chunked\r\n\r\n" + raw


def target(text: bytes, method: bytes = b"GET") -> bytes:
    return method + b" " + text + b" HTTP/1.1\r\n" + HOST + b"\r\n"


CASES = [
    Case("plain", GET + b"\r\n", (200,)),
    Case("two on one connection", GET + b"\r\n" + GET + b"\r\n", (200, 200)),
    Case("pipelined with bodies", (post(b"1") + GET + b"\r\n") * 3, (200,) * 6),
    Case("empty line before", b"\r\n" + GET + b"\r\n", (200,)),
    Case("empty lines between", (GET + b"\r\n\r\n") * 3, (200, 200, 200)),
    Case("empty lines alone", b"\r\n\r\n", ()),
    # methods
    Case("HEAD", target(b"/thing", b"HEAD"), (200,)),
    Case("HEAD then GET", target(b"/thing", b"HEAD") + GET + b"\r\n", (200, 200)),
    Case("HEAD of nothing", target(b"/nothing", b"HEAD"), (404,)),
    Case("DELETE", target(b"/thing", b"DELETE"), (405,)),
    Case("a method in lower case", target(b"/thing", b"get"), (405,)),
    Case("an unknown method", target(b"/thing", b"FROBNICATE"), (405,)),
    Case("OPTIONS", target(b"/thing", b"OPTIONS"), (204,)),
    Case("OPTIONS of all", target(b"*", b"OPTIONS"), (204,)),
    Case("OPTIONS of nothing", target(b"/nothing", b"OPTIONS"), (404,)),
    Case("CONNECT", target(b"kme:443", b"CONNECT"), (0,), closes=True),
    Case("TRACE", target(b"/thing", b"TRACE"), (405,)),
    Case("PRI of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", (0,), closes=True),
    # targets
    Case("absolute-form", target(b"http://kme:8443/thing"), (200,)),
    Case("absolute-form, upper case", target(b"HTTPS://kme/thing?x=1"), (200,)),
    Case("absolute-form without a path", target(b"http://kme"), (404,)),
    Case("absolute-form, a query alone", target(b"http://kme?x"), (404,)),
    Case("another scheme", target(b"ftp://kme/thing"), (0,), closes=True),
    Case("no slash", target(b"thing"), (0,), closes=True),
    Case("a fragment", target(b"/thing#x"), (0,), closes=True),
    Case("a slash behind", target(b"/thing/"), (200,)),
    Case("a slash twice", target(b"//thing"), (200,)),
    Case("percent-encoded", target(b"/%74hing"), (200,)),
    Case("a percent-encoded slash", target(b"/%2Fthing"), (404,)),
    Case("percent-encoding that is none", target(b"/thing%zz"), (404,)),
    Case("percent-encoding that is not UTF-8", target(b"/thing%ff"), (0,), closes=True),
    Case("a space in the target", b"GET /th ing HTTP/1.1\r\n" + HOST + b"\r\n", (0,), closes=True),
    Case("dots", target(b"/../thing"), (404,)),
    Case("a target of 3,000 bytes", target(b"/" + b"x" * 3000), (0,), closes=True),
    # versions
    Case("HTTP/1.0", b"GET /thing HTTP/1.0\r\n\r\n", (200,), closes=True),
    Case(
        "HTTP/1.0, keep-alive",
        b"GET /thing HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        (200,),
        True,
    ),
    Case("HTTP/0.9", b"GET /thing\r\n\r\n", (0,), closes=True),
    Case("HTTP/2.0", b"GET /thing HTTP/2.0\r\n" + HOST + b"\r\n", (0,), closes=True),
    Case("Connection: close", GET + b"Connection: close\r\n\r\n", (200,), closes=True),
    Case("Upgrade", GET + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n", (200,)),
    # header fields
    Case("no Host", b"GET /thing HTTP/1.1\r\n\r\n", (0,), closes=True),
    Case("Host twice", GET + HOST + b"\r\n", (0,), closes=True),
    Case("bare LF", GET.replace(b"\r\n", b"\n") + b"\n", (200,)),
    Case("bare CR", GET + b"X: a\rb\r\n\r\n", (0,), closes=True),
    Case("NUL", GET + b"X: a\0b\r\n\r\n", (0,), closes=True),
    Case("obs-fold", GET + b"X: a\r\n b\r\n\r\n", (200,)),
    Case("a space before the colon", GET + b"X : a\r\n\r\n", (0,), closes=True),
    Case("no colon", GET + b"X\r\n\r\n", (0,), closes=True),
    Case("no name", GET + b": x\r\n\r\n", (0,), closes=True),
    Case("obs-text", GET + b"X: \xe4\xff\r\n\r\n", (200,)),
    Case("headers of 3,000 bytes", GET + b"X: " + b"x" * 3000 + b"\r\n\r\n", (431,), closes=True),
    Case("1,000 headers", GET + b"X: y\r\n" * 1000 + b"\r\n", (431,), closes=True),
    Case("Expect: 100-continue", post(b"1", b"Expect: 100-continue"), (200,)),
    Case("another Expect", post(b"1", b"Expect: the best"), (417,), closes=True),
    Case("Content-Encoding", post(b"1", b"Content-Encoding: gzip"), (415,), closes=True),
    Case("Content-Encoding: identity", post(b"1", b"Content-Encoding: identity"), (200,)),
    # lengths
    Case("GET with a body", GET + b"Content-Length: 2\r\n\r\nhi", (200,)),
    Case("an empty body", post(b""), (400,)),
    Case("no length", POST + b"\r\n", (400,)),
    Case(
        "both lengths",
        chunked(b"").replace(b"\r\n\r\n", b"\r\nContent-Length: 3\r\n\r\n"),
        (0,),
        True,
    ),
    Case("both, the other order", post(b"0\r\n\r\n", b"Transfer-Encoding: chunked"), (0,), True),
    Case("chunked in HTTP/1.0", chunked(b"0\r\n\r\n").replace(b"/1.1", b"/1.0"), (0,), True),
    Case("two Content-Length", post(b"1", b"Content-Length: 2"), (0,), closes=True),
    Case("Content-Length: 1, 1", POST + b"Content-Length: 1, 1\r\n\r\n1", (200,)),
    Case("Content-Length: -1", POST + b"Content-Length: -1\r\n\r\n", (0,), closes=True),
    Case("Content-Length: +1", POST + b"Content-Length: +1\r\n\r\n1", (0,), closes=True),
    Case("Content-Length: 1e3", POST + b"Content-Length: 1e3\r\n\r\n", (0,), closes=True),
    Case("Content-Length: 0x10", POST + b"Content-Length: 0x10\r\n\r\n", (0,), closes=True),
    Case("Content-Length: 99999", POST + b"Content-Length: 99999\r\n\r\n", (413,), closes=True),
    Case(
        "a length of 5,000 digits",
        POST + b"Content-Length: " + b"9" * 1500 + b"\r\n\r\n",
        (0,),
        True,
    ),
    Case("a body of 3,000 bytes", post(b" " * 3000), (413,), closes=True),
    Case(
        "Transfer-Encoding: gzip, chunked",
        chunked(b"").replace(b"chunked", b"gzip, chunked"),
        (501,),
        True,
    ),
    Case(
        "Transfer-Encoding: identity", chunked(b"").replace(b"chunked", b"identity"), (501,), True
    ),
    Case(
        "Transfer-Encoding twice",
        chunked(b"0\r\n\r\n").replace(b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n", 1),
        (0,),
        True,
    ),
    # chunks
    Case("chunked", chunked(b"1\r\n1\r\n0\r\n\r\n"), (200,)),
    Case("chunked, then GET", chunked(b"1\r\n1\r\n0\r\n\r\n") + GET + b"\r\n", (200, 200)),
    Case("chunk extensions", chunked(b'1;a=b;c="d"\r\n1\r\n0;x\r\n\r\n'), (200,)),
    Case("trailers", chunked(b"1\r\n1\r\n0\r\nX: y\r\nContent-Length: 9\r\n\r\n"), (200,)),
    Case("a chunk of upper-case hex", chunked(b"A\r\n[1,2,3,45]\r\n0\r\n\r\n"), (200,)),
    Case(
        "chunks beyond the limit",
        chunked(b"3e8\r\n" + b" " * 1000 + b"\r\n1\r\n1\r\n"),
        (413,),
        True,
    ),
    Case("a chunk without a size", chunked(b"\r\n1\r\n0\r\n\r\n"), (0,), closes=True),
    Case("a chunk of a negative size", chunked(b"-1\r\n1\r\n0\r\n\r\n"), (0,), closes=True),
    Case("a chunk of 0x1", chunked(b"0x1\r\n1\r\n0\r\n\r\n"), (0,), closes=True),
    Case("a chunk that is longer", chunked(b"1\r\n12\r\n0\r\n\r\n"), (0,), closes=True),
    Case("a chunk of 2^80", chunked(b"1" + b"0" * 20 + b"\r\n1"), (0,), closes=True),
    # JSON
    Case("JSON", post(b'{"a":[1,null,"x"]}', b"Content-Type: application/json"), (200,)),
    Case(
        "JSON as a form",
        post(b'{"a":1}', b"Content-Type: application/x-www-form-urlencoded"),
        (200,),
    ),
    Case("JSON without a type", post(b'{"a":1}'), (200,)),
    Case(
        "another charset",
        post(b'{"a":1}', b"Content-Type: application/json; charset=latin-1"),
        (200,),
    ),
    Case("a byte order mark", post(b'\xef\xbb\xbf{"a":1}'), (200,)),
    Case("white space around", post(b' \t\r\n{"a":1}\n '), (200,)),
    Case("UTF-16", post('{"a":1}'.encode("utf-16")), (400,)),
    Case("latin-1", post(b'{"a":"\xe4"}'), (400,)),
    Case("a form", post(b"number=1&size=256"), (400,)),
    Case("a member twice", post(b'{"a":1,"a":2}'), (400,)),
    Case("a member twice, deep", post(b'[{"b":{"a":1,"\\u0061":2}}]'), (400,)),
    Case("NaN", post(b'{"a":NaN}'), (400,)),
    Case("Infinity", post(b'{"a":-Infinity}'), (400,)),
    Case("1e999", post(b'{"a":1e999}'), (400,)),
    Case("1.0", post(b'{"a":1.0}'), (200,)),
    Case("half of a pair", post(b'{"a":"\\ud800"}'), (400,)),
    Case("a pair", post(b'{"a":"\\ud83d\\ude00"}'), (200,)),
    Case("NUL in a string", post(b'{"a":"\\u0000"}'), (200,)),
    Case("a control character in a string", post(b'{"a":"\n"}'), (400,)),
    Case("a comma behind", post(b'{"a":1,}'), (400,)),
    Case("single quotes", post(b"{'a':1}"), (400,)),
    Case("nesting of 990", post(b"[" * 990), (400,)),
    Case("990 digits", post(b"9" * 990), (200,)),
    Case("two values", post(b"1 2"), (400,)),
    # failures
    Case("a handler that fails", target(b"/boom"), (500,)),
    Case("a handler that fails, then GET", target(b"/boom") + GET + b"\r\n", (500, 200)),
    Case("TLS", bytes.fromhex("16030100c8010000c40303") + bytes(200), (0,), closes=True),
    Case("garbage", b"\xff\xfe\0\x80" * 20 + b"\r\n\r\n", (0,), closes=True),
]
