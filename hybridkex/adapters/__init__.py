"""Adapters that run HTTP clients and servers over hybridkex (extra ``http``).

- :mod:`hybridkex.adapters.httpx`: a transport for ``httpx.AsyncClient``, on asyncio and on trio
- :mod:`hybridkex.adapters.uvicorn`: a protocol for ``uvicorn.run``
- :mod:`hybridkex.adapters.hypercorn`: serves an ASGI application on asyncio, with HTTP/2
"""
