"""The URLs of a KME: ETSI GS QKD 014 clause 5 for SAEs, ``/kmapi`` for the peer KME."""

import logging
import time
from typing import Final
from urllib.parse import parse_qs

from hybridkex.errors import KeySourceError
from hybridkex.kme.entity import KeyManagementEntity
from hybridkex.kme.metrics import KmeMetrics
from hybridkex.kme.peering import CHECK, EXT_KEYS, VOID, ExtKeys, ids_from_json
from hybridkex.net import http
from hybridkex.net.event_loop import in_thread
from hybridkex.qkd.etsi014.models import (
    API,
    ErrorResponse,
    Json,
    KeyIds,
    KeyRequest,
    ModelError,
)
from hybridkex.qkd.store import BlocksRefused

_SAE: Final = tuple(API.split("/")[1:])
_ROUTES: Final = (
    http.Route(name="status", path=(*_SAE, http.ANY, "status"), methods=("GET", "HEAD")),
    # GET draws keys here, so there is no HEAD.
    http.Route(name="enc_keys", path=(*_SAE, http.ANY, "enc_keys"), methods=("GET", "POST")),
    http.Route(name="dec_keys", path=(*_SAE, http.ANY, "dec_keys"), methods=("GET", "POST")),
    *(
        http.Route(name=name, path=tuple(url.split("/")[1:]), methods=("POST",))
        for url, name in ((EXT_KEYS, "ext_keys"), (VOID, "void"), (CHECK, "check"))
    ),
)

RETRY_AFTER: Final = "1"
"""Seconds after which a client may repeat a request that the key store failed (RFC 9110 section
10.2.3)."""

LONG_BODY: Final = 1 << 16
"""Bytes of a message that is parsed without a thread."""


def kme_handler(kme: KeyManagementEntity, caller: str, metrics: KmeMetrics) -> http.Handler:
    """The handler for one connection, which the certificate shows to be ``caller``'s."""

    async def handle(request: http.Request) -> http.Response:
        began = time.perf_counter()
        call = "unknown"
        try:
            route = http.find_route(_ROUTES, request)
            if isinstance(route, http.Route):
                call = route.name
                response = await _answer(kme, caller, call, request)
            else:
                response = route
        except http.HttpError as error:
            response = error.response()
        except ErrorResponse as refusal:
            if refusal.status != 401:  # logged where it is decided
                kme.log.log(logging.INFO, "%s: %s of %s: %s", kme.kme_id, call, caller, refusal)
            # The standard defines no body for 401, but two known clients read one.
            response = http.Response.json(refusal.status, refusal.body)
        except ModelError as error:
            kme.log.log(logging.INFO, "%s: %s of %s: %s", kme.kme_id, call, caller, error)
            response = http.Response.json(400, {"message": f"Bad request format: {error}"})
        except BlocksRefused as refused:
            response = _refused(refused)
        except KeySourceError:
            response = http.Response.json(
                503, {"message": "Error on server side"}, headers=(("Retry-After", RETRY_AFTER),)
            )
        metrics.requests.labels(kme.kme_id, call, response.status).inc()
        metrics.seconds.labels(kme.kme_id, call).observe(time.perf_counter() - began)
        return response

    return handle


async def _answer(
    kme: KeyManagementEntity, caller: str, call: str, request: http.Request
) -> http.Response:
    if call in ("ext_keys", "void", "check"):
        async with kme.admit_peer(caller):
            return await _answer_to_peer(kme, caller, call, request)
    kme.admit(caller)
    other = request.path[3]
    result: Json
    match call:
        case "status":
            result = (await kme.status(caller, other)).to_json()
        case "enc_keys":
            result = (await kme.get_key(caller, other, _key_request(request))).to_json()
        case _:
            ids = _key_ids(request)
            result = (await kme.get_key_with_ids(caller, other, ids.key_ids)).to_json()
    return http.Response.json(200, result)


async def _answer_to_peer(
    kme: KeyManagementEntity, peer: str, call: str, request: http.Request
) -> http.Response:
    def parsed() -> ExtKeys | list[str]:
        body = _body(request)
        return ExtKeys.from_json(body) if call == "ext_keys" else ids_from_json(body)

    # In a thread: a message of the largest size takes a second, and other requests must not wait.
    match await in_thread(parsed) if len(request.body) > LONG_BODY else parsed():
        case ExtKeys() as message:
            await kme.peer_allots(peer, message)
        case ids if call == "void":
            await kme.peer_voids(peer, ids)
        case ids:
            return http.Response.json(200, {"key_ids": await kme.peer_checks(peer, ids)})
    return http.Response(status=202)


def _key_request(request: http.Request) -> KeyRequest:
    if request.method == "GET":
        return KeyRequest.from_query(_query(request))
    # An empty body is an empty key request (clause 6.2: every member is optional).
    return KeyRequest.from_json(_body(request)) if request.body else KeyRequest()


def _key_ids(request: http.Request) -> KeyIds:
    if request.method == "GET":
        return KeyIds.from_query(_query(request))
    return KeyIds.from_json(_body(request))


def _query(request: http.Request) -> dict[str, list[str]]:
    try:
        return parse_qs(request.query, keep_blank_values=True, max_num_fields=16)
    except ValueError:
        raise ModelError("the query is malformed") from None


def _body(request: http.Request) -> object:
    try:
        return http.parse_json(request.body)
    except ValueError:
        raise ModelError("the body is not JSON") from None


def _refused(refused: BlocksRefused) -> http.Response:
    """409 in the form of RFC 9457."""
    problem = {
        "type": "about:blank",
        "title": "Conflict",
        "status": 409,
        "detail": str(refused),
        "refused": {key_id: state.value for key_id, state in refused.states.items()},
    }
    return http.Response.json(409, problem, "application/problem+json")
