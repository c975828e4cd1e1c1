"""Commands that run for long say when a certificate expires: their own, and those that they see."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trio
from cryptography import x509

from hybridkex.auth.dev_ca import DevCa, write_identity
from hybridkex.cli.key_sources import key_sources
from hybridkex.cli.own_certificate import watched
from hybridkex.cli.qkd_options import KmeOptions, QkdOptions
from hybridkex.crypto import expiry
from hybridkex.shell.expiry_watch import CHECK_EVERY, REMEMBERED, ExpiryWatch

END = datetime(2030, 6, 15, 12, tzinfo=UTC)
CA = DevCa.create()


def certificate(ends: datetime, days: float = 365) -> x509.Certificate:
    begins = ends - timedelta(days=days)
    return CA.issue("localhost", not_before=begins, not_after=ends).leaf


@pytest.mark.parametrize(
    ("days", "now", "said", "left"),
    [
        (365, END - timedelta(days=20), None, 6 * 86400),
        (365, END - timedelta(days=14), None, 0),
        (365, END - timedelta(days=1), "expires on 2030-06-15: renew it", 86400),
        (365, END + timedelta(seconds=1), "expired on 2030-06-15: renew it", None),
        # Renewed every few days, as a matter of course: not warned about all the time.
        (6, END - timedelta(days=3), None, 86400),
        (6, END - timedelta(days=1), "expires on 2030-06-15: renew it", 86400),
        (1 / 24, END - timedelta(minutes=21), None, 60),
        (1 / 24, END - timedelta(minutes=19), "expires on 2030-06-15: renew it", 19 * 60),
    ],
)
def test_what_is_said_when(days: float, now: datetime, said: str | None, left: float) -> None:
    one = certificate(END, days)
    assert expiry.problem_of_expiry("c.pem", one, now) == (said and f"c.pem {said}")
    assert expiry.seconds_to_next(one, now) == left


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[datetime]:
    """The current time, which a test may set."""
    times = [END]

    class Clock(datetime):
        @classmethod
        def now(cls, tz: object = None) -> "Clock":
            return times[-1]  # type: ignore[return-value]

    monkeypatch.setattr(expiry, "datetime", Clock)
    return times


async def test_each_is_said_once(
    clock: list[datetime],
    autojump_clock: trio.testing.MockClock,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock.append(END - timedelta(days=16))
    told = []
    with watched(Path("cert.pem"), certificate(END)):
        for _ in range(20 * 24):
            await trio.sleep(3600)
            clock.append(clock[-1] + timedelta(hours=1))
            told.append([record.getMessage().split()[4] for record in caplog.records])
    assert told[24] == []
    assert told[3 * 24] == told[15 * 24] == ["expires"]
    assert told[-1] == ["expires", "expired"]
    await trio.sleep(86400)
    assert len(caplog.records) == 2


async def test_the_certificate_that_is_shown_to_a_kme(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ends = datetime.now(UTC) + timedelta(days=3)
    begins = ends - timedelta(days=90)
    write_identity(tmp_path, CA, CA.issue("alice", not_before=begins, not_after=ends))
    kme = KmeOptions(
        kme="https://localhost:1",
        kme_ca=tmp_path / "ca.pem",
        kme_cert=tmp_path / "cert.pem",
        kme_key=tmp_path / "key.pem",
        kme_id=None,
        kme_id_rule=None,
        kme_tls=None,
    )
    options = QkdOptions(
        kme=kme,
        sae="alice",
        peer_sae=["bob"],
        peer_kme_id=None,
        key_pool=None,
        pool_key=None,
        requirement=None,
    )
    async with key_sources(options):
        pass
    [line] = [record.getMessage() for record in caplog.records]
    own = f"our own certificate {tmp_path / 'cert.pem'}"
    assert line == f"{own} expires on {ends:%Y-%m-%d}: renew it"


async def test_a_raw_key_does_not_expire() -> None:
    with watched(None, None):
        await trio.lowlevel.checkpoint()


def test_a_peer_that_renews_its_certificate(clock: list[datetime]) -> None:
    told: list[str] = []
    watch = ExpiryWatch(told.append)
    old, new = certificate(END), certificate(END + timedelta(days=365))
    clock.append(END - timedelta(days=15))
    watch.watch_peer("SAE alice", old)
    assert watch.check() == CHECK_EVERY
    assert not told
    clock.append(END - timedelta(days=13))
    watch.check()
    remedy = "its owner must renew it, since it is refused from then on"
    assert told == [f"the certificate of SAE alice expires on 2030-06-15: {remedy}"]
    watch.watch_peer("SAE alice", new)
    clock.append(END + timedelta(days=1))
    assert watch.check() == CHECK_EVERY
    assert len(told) == 1


def test_a_peer_with_several_certificates_is_named_once_for_each(clock: list[datetime]) -> None:
    told: list[str] = []
    watch = ExpiryWatch(told.append)
    clock.append(END - timedelta(days=REMEMBERED))
    several = [certificate(END - timedelta(days=number)) for number in range(REMEMBERED - 1)]
    for _ in range(100):
        for one in several:
            watch.watch_peer("SAE alice", one)
    assert len(told) == len(set(told)) == len(several)
