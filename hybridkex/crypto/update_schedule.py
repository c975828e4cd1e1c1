"""The chain of main secrets: one link for each Extended Key Update.

draft-ietf-tls-extended-key-update-13 section 7 and, where a QKD key goes in as well,
``docs/fresh-keys.md``. Only the salt for the next main secret is kept.
"""

from hybridkex.crypto.schedule import ExporterSecret, MainSecret, TrafficSecret
from hybridkex.crypto.suites import CipherSuite
from hybridkex.secret import Secret
from hybridkex.values import value


@value
class Generation:
    """The secrets of an epoch from which the next one is derived."""

    suite: CipherSuite
    number: int
    salt: Secret
    """``Derive-Secret(main_secret_N, "derived", "")``."""
    transcript: bytes
    """``transcript_hash_N``."""
    exporter: ExporterSecret
    """``exporter_secret_N``."""

    @classmethod
    def first(
        cls, suite: CipherSuite, main: MainSecret, server_finished: bytes, client_finished: bytes
    ) -> "Generation":
        """Epoch 0, which the handshake makes.

        Args:
            suite: the cipher suite.
            main: the Main Secret.
            server_finished: the hash of ClientHello...server Finished.
            client_finished: the hash of ClientHello...client Finished.
        """
        exporter = main.updatable_exporter_secret(server_finished)
        return cls(suite, 0, main.update_salt(), client_finished, exporter)

    def next(
        self, request: bytes, response: bytes, shared: Secret, slot: Secret | None
    ) -> "EpochSecrets":
        """The next epoch.

        Args:
            request: the message, with its header.
            response: likewise.
            shared: the secret of the new key exchange.
            slot: where the update has a slot for a QKD key, the imported key or, without one, as
                many zeros as the hash is long; ``None`` where it has no slot.
        """
        function = self.suite.hash
        transcript = function.digest(self.transcript + request + response)
        salt = self.salt
        if slot is not None:
            salt = MainSecret.extract(function, salt, slot).update_salt()
        main = MainSecret.extract(function, salt, shared)
        return EpochSecrets(
            client=main.client_application_traffic(self.suite, transcript),
            server=main.server_application_traffic(self.suite, transcript),
            generation=Generation(
                self.suite,
                self.number + 1,
                main.update_salt(),
                transcript,
                main.exporter_secret(transcript),
            ),
        )


@value
class EpochSecrets:
    """A new epoch: its traffic secrets, and what is kept for the one after it."""

    client: TrafficSecret
    server: TrafficSecret
    generation: Generation
