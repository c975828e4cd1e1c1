"""The standard library's ``ssl``, with the OpenSSL that its Python is linked to.

Its PSK callbacks came with Python 3.13: where the matrix runs under an older one, a newer one of
this machine is the peer, if there is any.
"""

import json
import shutil
import ssl
import subprocess
import sys
from functools import partial
from typing import Final

from interop.matrix.peer import Peer
from interop.matrix.peers.python import python_agent
from interop.matrix.peers.reasons import IMPORT, NO_HYBRIDS, NO_MLDSA

__all__ = ["PEER"]

_PSK: Final = (3, 13)
_ASK: Final = "import json, ssl; print(json.dumps(ssl.OPENSSL_VERSION_INFO))"


def _newer() -> tuple[str, tuple[int, ...]] | None:
    """A Python with PSK callbacks, and the version of its OpenSSL."""
    for minor in (14, 13):
        path = shutil.which(f"python3.{minor}")
        # Version managers have commands for versions that are not in use, which only complain.
        told = path and subprocess.run([path, "-c", _ASK], capture_output=True, check=False)
        if path and told and told.returncode == 0:
            return path, tuple(json.loads(told.stdout))
    return None


_FOUND: Final = None if sys.version_info >= _PSK else _newer()
_PYTHON, _OPENSSL = _FOUND or (sys.executable, ssl.OPENSSL_VERSION_INFO)
_OLD: Final = NO_HYBRIDS | NO_MLDSA if _OPENSSL < (3, 5) else {}
_NO_PSK: Final = (
    {"* plain PSK": "its PSK callbacks came with 3.13, which is not there"}
    if sys.version_info < _PSK and _FOUND is None
    else {}
)

PEER: Final = Peer(
    name="Python's ssl",
    open=partial(
        python_agent, "ssl_module", "ssl", needs="ssl", package="python", interpreter=_PYTHON
    ),
    lacks=_OLD
    | _NO_PSK
    | {
        "* retry from x25519 to X25519MLKEM768": "no choice of groups but one of NIST's curves",
        "* KeyUpdate request": "no call for it",
        "* exporter": "no call for it",
    }
    | IMPORT,
)
