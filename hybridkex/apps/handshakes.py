"""Messages for failed handshakes of our own."""

from hybridkex import ClientConfig, ServerConfig
from hybridkex.errors import AlertReceived, TruncationError
from hybridkex.machine import broken


def handshake_failed(error: BaseException, config: ClientConfig | ServerConfig) -> str:
    """Describe why a handshake failed, with the next step if one is likely.

    OpenSSL before 3.5 answers a client without classical groups with handshake_failure, and other
    servers just close the connection.
    """
    text = f"handshake failed: {broken(error)}"
    cause = error.__cause__
    unwanted = isinstance(cause, TruncationError) or (
        isinstance(cause, AlertReceived) and cause.name == "handshake_failure"
    )
    if isinstance(config, ServerConfig) or not unwanted:
        return text
    if all(group.post_quantum for group in config.group_list):
        text += (
            "; the server may lack a post-quantum group: '--groups X25519MLKEM768,x25519' also "
            "offers a classical one"
        )
    return text
