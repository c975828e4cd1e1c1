"""``hybridkex connect``: a secure channel to a server, in the manner of ``s_client -quiet``."""

from pathlib import Path
from typing import Final

from hybridkex.cli.arguments import Action, Command, argument, nested, option
from hybridkex.cli.options import ChannelOptions
from hybridkex.values import value


@value(kw_only=True)
class ConnectOptions:
    host: str = argument("the server's name or IP address", metavar="HOST")
    port: int = argument("the server's TCP port", metavar="PORT")
    server_name: str | None = option(
        "the name in the server's certificate, if not HOST", metavar="NAME"
    )
    resume: Path | None = option("store session tickets in FILE and resume sessions with them")
    channel: ChannelOptions = nested()


COMMAND: Final = Command(
    "Open a TLS 1.3 channel to a server. Standard input is sent to the server; what the server "
    "sends is written to standard output. End of input closes our direction; the command ends "
    "when the server closes its own.\n\nBy default the server's certificate is verified "
    "against the system's authorities. A server without a post-quantum group is refused unless "
    "--groups names a classical one.",
    examples=[
        "connect localhost 4433 --ca keys/ca.pem --json < file",
        "connect example.org 443 --alpn http/1.1 --groups X25519MLKEM768,x25519",
        'connect localhost 4433 --psk "site-a:$(cat psk.hex)" --psk-import 00',
    ],
    status="0 after a clean close by the peer, 1 otherwise, with one line on standard error",
    notes="The other end can be 'hybridkex listen' or 'openssl s_server' (3.5 or newer, or "
    "older with --groups x25519).",
    action=Action("connect", ConnectOptions),
)
