"""``hybridkex listen``: accept secure channels, in the manner of ``s_server``."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument, nested, option
from hybridkex.cli.logs import log_level
from hybridkex.cli.options import ChannelOptions, port_file


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    port: int = argument("the TCP port; 0 picks a free one", metavar="PORT")
    require_client_cert: bool = option("refuse clients without a certificate")
    echo: bool = option("send each client's data back; serve many at once")
    once: bool = option("end after the first connection")
    port_file: Path | None = port_file()
    log_level: str = log_level("warning")
    channel: ChannelOptions = nested()


COMMAND: Final = Command(
    "Accept TLS 1.3 channels, one after the other. What a client sends is written to standard "
    "output; standard input is sent to the client. With --echo each client gets its own data "
    "back, and many are served at once.",
    examples=[
        "listen 4433 --cert keys/cert.pem --key keys/key.pem > received",
        "listen 4433 --cert cert.pem --key key.pem --ca clients.pem --require-client-cert",
        'listen 0 --echo --port-file port --psk "site-a:$(cat psk.hex)"',
    ],
    status="0 after a clean close (with --once: of the one connection), 1 otherwise",
    notes="A failed handshake ends the command only with --once.",
    action=Action("listen", ListenOptions),
)
