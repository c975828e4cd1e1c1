"""Commands that run for long say when their own certificate expires."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio

from hybridkex.auth.dev_ca import DevCa
from hybridkex.cli import own_certificate
from hybridkex.cli.own_certificate import watched
from hybridkex.crypto import expiry

END = datetime(2030, 6, 15, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("now", "said", "left"),
    [
        (END - timedelta(days=20), None, 6 * 86400),
        (END - timedelta(days=14), None, 0),
        (END - timedelta(days=1), "expires on 2030-06-15: renew it", 86400),
        (END + timedelta(seconds=1), "expired on 2030-06-15: renew it", None),
    ],
)
def test_what_is_said_when(now: datetime, said: str | None, left: float | None) -> None:
    found = expiry.problem_of_expiry("c.pem", END, now)
    assert found == (said and f"our own certificate c.pem {said}")
    assert expiry.seconds_to_next(END, now) == left


async def test_each_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    identity = DevCa.create().issue("localhost")
    ends = own_certificate.certificate_from_der(identity.chain[0]).not_valid_after_utc
    begin = ends - timedelta(days=16)

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":
            return begin + timedelta(seconds=trio.current_time() - began)  # type: ignore[return-value]

    monkeypatch.setattr(expiry, "datetime", Clock)
    monkeypatch.setattr(own_certificate, "datetime", Clock)
    began = trio.current_time()
    told = []
    with watched(Path("cert.pem"), identity):
        for _ in range(20):
            await trio.sleep(86400)
            told.append([record.getMessage().split()[4] for record in caplog.records])
    assert told[0] == []
    assert told[3] == told[14] == ["expires"]
    assert told[-1] == ["expires", "expired"]
    await trio.sleep(86400)
    assert len(caplog.records) == 2


async def test_a_raw_key_does_not_expire() -> None:
    with watched(None, None):
        await trio.lowlevel.checkpoint()
