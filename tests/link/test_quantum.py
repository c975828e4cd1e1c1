"""Sampled light against the closed forms, and against light pulse by pulse."""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import scipy  # its modules are loaded when a test needs them: scipy.stats takes 0.3 s
import trio
import trio.testing

from hybridkex.errors import ConfigError, LinkError
from hybridkex.link.eavesdroppers import NoEve, eavesdropper
from hybridkex.link.physics import Channel, Transmitter, gain_from_yields
from hybridkex.link.presets import PRESETS
from hybridkex.link.quantum import Detections, OpticalLink, PulseRecord, Sent, sample
from hybridkex.link.randomness import Randomness
from hybridkex.link.remote import REQUEST, RemoteDetector, serve_detector
from tests.link.pulses import Pulses, send_pulses

LEVEL = 1e-4
"""Of the tests below: with their fixed seeds they pass or fail always."""


def passes(observed: "np.ndarray", expected: "np.ndarray") -> bool:
    observed, expected = np.asarray(observed, float), np.asarray(expected, float)
    few = expected < 10
    if few.any():
        assert abs(observed[few].sum() - expected[few].sum()) < 5 * expected[few].sum() ** 0.5 + 1
        observed, expected = observed[~few], expected[~few]
    return bool(
        scipy.stats.chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1)
        > LEVEL
    )


def table(sent: Sent, clicks: Detections, intensities: int) -> "np.ndarray":
    """Detections by intensity, bases, and whether the bits differ."""
    code = ((sent.intensity * 2 + sent.basis) * 2 + clicks.basis) * 2 + (sent.bit ^ clicks.bit)
    return np.bincount(code.astype(np.int64), minlength=intensities * 8)


def expected_table(channel: Channel, transmitter: Transmitter) -> "np.ndarray":
    """The same per pulse, by the closed forms."""
    q = transmitter.key_basis_probability
    cells = []
    for k, p in zip(transmitter.intensities, transmitter.probabilities, strict=True):
        gain, wrong = channel.gain(k), channel.error(k)
        for sent, seen in ((0, 0), (0, 1), (1, 0), (1, 1)):
            bases = (q, 1 - q)[sent] * (q, 1 - q)[seen]
            bad = wrong if sent == seen else gain / 2
            cells += [p * bases * (gain - bad), p * bases * bad]
    return np.array(cells)


@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
def test_the_response_of_a_laser_is_computed_once_for_each_intensity(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The search for settings does it thousands of times."""
    channel, source = PRESETS[name].channel, PRESETS[name].transmitter
    expected = [(channel.gain(k), channel.error(k)) for k in source.intensities]
    asked, seen = [], Channel.seen
    monkeypatch.setattr(Channel, "seen", lambda *given: asked.append(given) or seen(*given))
    assert source.response(channel) == expected
    assert len(asked) == len(source.intensities)


@pytest.mark.parametrize("name", ["lim2014", "rusca2018", "gys2005", "boaron2018"])
@pytest.mark.parametrize("distance", [0, 50, 100])
def test_detections_follow_the_closed_forms(name: str, distance: float) -> None:
    chosen = PRESETS[name].at(distance)
    count = 2_000_000
    sent, clicks = sample(
        chosen.channel,
        chosen.transmitter,
        chosen.channel,
        count,
        first=0,
        randomness=Randomness.seeded(1, name),
    )
    kinds = len(chosen.transmitter.intensities)
    cells = expected_table(chosen.channel, chosen.transmitter)
    total = cells.sum()
    assert passes(table(sent, clicks, kinds), count * cells / total)
    # The gain of a mean pulse: waiting times are geometric, with this mean and deviation.
    assert total == pytest.approx(chosen.transmitter.mean_gain(chosen.channel))
    pulses = int(clicks.pulse[-1]) + 1 - (count - 1) * chosen.channel.dead_pulses
    assert abs(pulses - count / total) < 4 * np.sqrt(count * (1 - total)) / total
    assert (np.diff(clicks.pulse) > 0).all()
    assert abs(int(sent.bit.sum()) - count / 2) < 4 * np.sqrt(count) / 2


@pytest.mark.parametrize("name", ["lim2014", "rusca2018", "gys2005", "boaron2018"])
@pytest.mark.parametrize("distance", [0, 50, 100])
def test_gains_and_error_rates_of_each_intensity(name: str, distance: float) -> None:
    """Q_k and E_k as a party would estimate them, one chi-square each."""
    chosen = PRESETS[name].at(distance)
    channel, transmitter = chosen.channel, chosen.transmitter
    sent, clicks = sample(
        channel, transmitter, channel, 1_000_000, first=0, randomness=Randomness.seeded(2, name)
    )
    alive = int(clicks.pulse[-1]) + 1 - (len(clicks.pulse) - 1) * channel.dead_pulses
    gains = np.array([channel.gain(k) for k in transmitter.intensities])
    rates = np.array([channel.error(k) for k in transmitter.intensities]) / gains
    seen = np.bincount(sent.intensity, minlength=len(gains))
    expected = alive * np.array(transmitter.probabilities) * gains
    deviates = (seen - expected) ** 2 / (expected * (1 - gains))
    assert scipy.stats.chi2.sf(deviates.sum(), len(gains)) > LEVEL
    same = sent.basis == clicks.basis
    total = np.bincount(sent.intensity[same], minlength=len(gains))
    wrong = np.bincount(sent.intensity[same & (sent.bit != clicks.bit)], minlength=len(gains))
    enough = total * rates > 5  # of a vacuum next to no click is among a million
    assert enough[:2].all()
    deviates = (wrong - total * rates) ** 2 / (total * rates * (1 - rates))
    assert scipy.stats.chi2.sf(deviates[enough].sum(), enough.sum()) > LEVEL


@pytest.mark.parametrize("distance", [0, 50, 100])
def test_yields_of_photon_numbers(distance: float) -> None:
    """Y_n: how often pulses of n photons make a click, counted pulse by pulse."""
    chosen = PRESETS["rusca2018"].at(distance)
    channel = chosen.channel
    pulses, seen = np.zeros(4), np.zeros(4)
    for part in range(3):
        sent: list[np.ndarray] = []

        def watch(_: NoEve, light: Pulses, __: Randomness) -> Pulses:
            sent.append(light[0])  # noqa: B023
            return light

        _, clicks = send_pulses(
            channel,
            chosen.transmitter,
            NoEve(channel),
            1_000_000,
            randomness=Randomness.seeded(part, "yields"),
            touch=watch,
        )
        many = np.minimum(sent[0], 4)
        pulses += np.bincount(many, minlength=5)[:4]
        seen += np.bincount(many[clicks.pulse], minlength=5)[:4]
    yields = 1 - (1 - channel.background) * (1 - channel.eta) ** np.arange(4)
    expected = pulses * yields
    assert seen[0] <= expected[0] + 6  # dark counts, of which there is hardly one
    deviates = (seen - expected)[1:] ** 2 / (expected * (1 - yields))[1:]
    assert (expected[1:] > 5).all()
    assert scipy.stats.chi2.sf(deviates.sum(), 3) > LEVEL


async def test_the_clock_of_the_laser_can_be_kept() -> None:
    chosen = PRESETS["gys2005"].at(50)
    fibre = OpticalLink(chosen.channel, chosen.transmitter, seed=1, real_time=True)
    began = trio.current_time()
    await fibre.detect(300)
    assert trio.current_time() - began >= fibre.seconds > 0.05
    hours = OpticalLink(chosen.channel.at(100), chosen.transmitter, seed=1)
    began = trio.current_time()
    await hours.detect(1_000_000)
    assert hours.seconds > 3600  # and this test is not an hour long
    assert trio.current_time() - began < hours.seconds / 60


@pytest.mark.parametrize("eve", [None, "intercept:1", "intercept:0.3", "split:0.5", "pns"])
@pytest.mark.parametrize("name", ["lim2014", "rusca2018"])
def test_pulse_by_pulse_agrees(name: str, eve: str | None) -> None:
    chosen = PRESETS[name].at(10)
    channel, transmitter = chosen.channel, chosen.transmitter
    light = NoEve(channel) if eve is None else eavesdropper(eve, channel, transmitter)
    rows, pulses = [], 0
    for part in range(4):
        sent, clicks = send_pulses(
            channel, transmitter, light, 500_000, randomness=Randomness.seeded(part, f"{name}{eve}")
        )
        rows.append(table(sent, clicks, len(transmitter.intensities)))
        pulses += 500_000
    slow = np.sum(rows, axis=0)
    quick, many = sample(
        channel, transmitter, light, 2_000_000, first=0, randomness=Randomness.seeded(3, "quick")
    )
    fast = table(quick, many, len(transmitter.intensities))
    # Two samples of one distribution: cells with few are put together.
    few = slow < 20
    slow = np.append(slow[~few], slow[few].sum())
    fast = np.append(fast[~few], fast[few].sum())
    if slow[-1] == 0:
        slow, fast = slow[:-1], fast[:-1]
    total = slow.sum() / fast.sum()
    statistic = ((slow - total * fast) ** 2 / (slow + total**2 * fast)).sum()
    assert scipy.stats.chi2.sf(statistic, len(slow) - 1) > LEVEL
    rate = 2_000_000 / (int(many.pulse[-1]) + 1)
    assert abs(slow.sum() - pulses * rate) < 5 * np.sqrt(pulses * rate)


def test_dead_time_agrees() -> None:
    channel = Channel(
        receiver_efficiency=0.3,
        dark_count_probability=1e-6,
        misalignment=0.01,
        dead_time_s=50e-9,
    )
    transmitter = PRESETS["rusca2018"].transmitter
    _, slow = send_pulses(
        channel, transmitter, NoEve(channel), 500_000, randomness=Randomness.seeded(1, "dead")
    )
    _, fast = sample(
        channel, transmitter, channel, 20_000, first=0, randomness=Randomness.seeded(2, "dead")
    )
    assert np.diff(slow.pulse).min() == np.diff(fast.pulse).min() == 51
    slow_rate, fast_rate = len(slow.pulse) / 500_000, 20_000 / fast.pulse[-1]
    assert slow_rate == pytest.approx(fast_rate, rel=0.02)
    alive = channel.gain(0.5) * 0.7 + channel.gain(0.2) * 0.3
    assert fast_rate == pytest.approx(alive / (1 + 50 * alive), rel=0.02)


def test_full_intercept_resend_is_a_quarter_of_wrong_bits() -> None:
    chosen = PRESETS["lim2014"].at(20)
    light = eavesdropper("intercept", chosen.channel, chosen.transmitter)
    sent, clicks = sample(
        chosen.channel,
        chosen.transmitter,
        light,
        1_000_000,
        first=0,
        randomness=Randomness.seeded(5, "eve"),
    )
    same = sent.basis == clicks.basis
    bright = same & (sent.intensity == 0)
    rate = (sent.bit ^ clicks.bit)[bright].mean()
    # 1/4, a half of the misalignment, and half of the after-pulses and dark counts.
    channel = chosen.channel
    ideal = 0.25 + channel.misalignment / 2
    exact = (ideal + channel.afterpulse_probability / 2) / (1 + channel.afterpulse_probability)
    assert abs(rate - exact) < 4 * np.sqrt(exact * (1 - exact) / bright.sum()) + 1e-4
    assert abs(rate - 0.25) < 0.015


def test_photon_number_splitting_hides_in_the_bright_intensity_alone() -> None:
    chosen = PRESETS["gys2005"].at(60)
    light = eavesdropper("pns", chosen.channel, chosen.transmitter)
    gains = [gain_from_yields(light, k) / gain_from_yields(chosen.channel, k) for k in (0.48, 0.05)]
    assert gains[0] == pytest.approx(1.0)
    assert gains[1] < 0.2


@pytest.mark.parametrize(
    "text", ["", "other", "intercept:2", "intercept:0", "split:x", "split:", "split:nan", "pns:0.5"]
)
def test_unknown_eavesdroppers(text: str) -> None:
    chosen = PRESETS["gys2005"]
    with pytest.raises(ConfigError, match=r"no eavesdropper|must be above 0, and at most 1"):
        eavesdropper(text, chosen.channel, chosen.transmitter)


def test_alice_remembers_and_never_admits_that_a_pulse_was_lost() -> None:
    chosen = PRESETS["lim2014"]
    log = PulseRecord(chosen.transmitter, Randomness.seeded(1, "log"))
    sent, clicks = sample(
        chosen.channel,
        chosen.transmitter,
        chosen.channel,
        1000,
        first=0,
        randomness=Randomness.seeded(2, "log"),
    )
    log.keep(clicks.pulse, sent)
    again = log.recall(clicks.pulse)
    assert (again.bit == sent.bit).all()
    assert (again.basis == sent.basis).all()
    mixed = np.union1d(clicks.pulse, np.arange(1, 10**6, 997))
    found = log.recall(mixed)
    assert (found.bit[np.isin(mixed, clicks.pulse)] == sent.bit).all()
    log.forget()
    assert not sent.bit.any()


async def test_the_fibre_goes_on_where_it_was_and_repeats_with_its_seed() -> None:
    chosen = PRESETS["boaron2018"].at(50)
    runs = []
    for _ in range(2):
        fibre = OpticalLink(chosen.channel, chosen.transmitter, seed=3)
        runs.append([await fibre.detect(100), await fibre.detect(100)])
        assert fibre.seconds == pytest.approx((runs[-1][1].pulse[-1] + 1) / 2.5e9)
    first, second = runs[0]
    assert first.pulse[-1] + 75 < second.pulse[0]  # 30 ns at 2.5 GHz
    assert (runs[1][1].pulse == second.pulse).all()
    other = OpticalLink(chosen.channel, chosen.transmitter)
    assert ((await other.detect(100)).pulse != first.pulse).any()


@pytest.mark.parametrize(
    "pulse",
    [
        [5, 5, 6],
        [5, 4, 6],
        [-1, 2, 3],
        [5, -(2**63) + 3, -(2**63) + 4],  # the distance of the first two overflows
    ],
)
async def test_detections_that_are_not_in_order(pulse: list[int]) -> None:
    ours, theirs = trio.testing.memory_stream_pair()
    request = REQUEST.pack(0, len(pulse))
    await theirs.send_all(request + np.array(pulse, dtype="<i8").tobytes() + b"\0\0")
    with pytest.raises(LinkError, match="malformed detections"):
        await RemoteDetector(ours).detect(len(pulse))


@pytest.mark.parametrize("end", ["bob", "alice"])
async def test_a_message_that_stops_in_its_middle_ends_the_session(
    end: str, autojump_clock: object
) -> None:
    """Bob may ask when he likes, and light may take hours, but what has begun to arrive goes on."""
    ours, theirs = trio.testing.memory_stream_pair()
    chosen = PRESETS["rusca2018"]
    light = OpticalLink(chosen.channel, chosen.transmitter, seed=1)

    async def wait() -> None:
        if end == "bob":
            await RemoteDetector(ours).detect(100)
        else:
            await serve_detector(light, ours, most=100)

    with trio.fail_after(1e4):
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def _() -> None:
                with pytest.raises(LinkError, match="stood still for 60 s"):
                    await wait()

            for _ in range(200):  # no limit so far
                await trio.sleep(25)
                if end == "bob":
                    await theirs.send_all(REQUEST.pack(0, 0))
            await theirs.send_all(b"\0\0")
            began = trio.current_time()
    assert trio.current_time() - began < 100


@pytest.mark.parametrize("way", ["nothing is lost", "requests", "answers"])
async def test_bob_waits_for_late_light_and_not_for_a_lost_message(
    way: str, autojump_clock: object
) -> None:
    """A connection that passes nothing on, such as one half of a proxy, stays open."""
    bob, bobs_wire = trio.testing.memory_stream_pair()
    alice, alices_wire = trio.testing.memory_stream_pair()

    async def relay(name: str, source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        async for data in source:
            if name != way:
                await sink.send_all(data)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(relay, "requests", bobs_wire, alices_wire)
        nursery.start_soon(relay, "answers", alices_wire, bobs_wire)
        nursery.start_soon(partial(serve_detector, Light(), alice, most=100_000))
        if way == "nothing is lost":
            assert len((await RemoteDetector(bob).detect(50_000)).pulse) == 50_000
            assert trio.current_time() >= 10_000
        else:
            with trio.fail_after(70), pytest.raises(LinkError, match="stood still"):
                await RemoteDetector(bob).detect(50_000)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("error", [MemoryError(), LinkError("the light went out")], ids=repr)
async def test_light_that_fails_is_one_error(error: Exception) -> None:
    alice, bob = trio.testing.memory_stream_pair()

    class Dark:
        async def detect(self, count: int) -> Detections:
            raise error

    await bob.send_all(REQUEST.pack(0, 10))
    with pytest.raises(type(error)):
        await serve_detector(Dark(), alice, most=10)


class Light:
    """Five detections a second, without a thread, so that the clock may jump."""

    def __init__(self) -> None:
        self.last = -1

    async def detect(self, count: int) -> Detections:
        await trio.sleep(count / 5)
        pulse = self.last + 1 + np.arange(count)
        self.last = int(pulse[-1])
        bits = np.zeros(count, dtype=np.uint8)
        return Detections(pulse=pulse, basis=bits, bit=bits)


DETECTIONS = 20
ANSWER = REQUEST.size + 8 * DETECTIONS + 2 * 3


@pytest.mark.parametrize("how", ["doubled", "cut", "held back"])
@pytest.mark.parametrize(
    ("direction", "first", "count"),
    [("requests", REQUEST.size * skip + at, count)
     for skip in (0, 1) for at, count in [(0, REQUEST.size), (0, 4), (8, 4), (5, 1)]]
    + [("answers", at, count)
       for at, count in [(0, ANSWER), (ANSWER, ANSWER), (0, 8), (50, 8), (ANSWER - 1, 1)]],
)  # fmt: skip
async def test_bob_has_the_light_that_alice_has_a_record_of(
    direction: str, first: int, count: int, how: str, autojump_clock: object
) -> None:
    """Bytes that are doubled or cut out end the session; no answer is taken for that of another
    request."""
    bob, bobs_wire = trio.testing.memory_stream_pair()
    alice, alices_wire = trio.testing.memory_stream_pair()
    light = Light()
    over: list[str] = []

    async def relay(name: str, source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
        seen, part = 0, bytearray()
        async for data in source:
            for one in data:
                inside = name == direction and first <= seen < first + count
                seen += 1
                if inside:
                    part.append(one)
                if not inside or how == "doubled":
                    await sink.send_all(bytes([one]))
                if inside and len(part) == count and how != "cut":
                    await trio.sleep(30)
                    await sink.send_all(part)

    async def ask() -> None:
        detector = RemoteDetector(bob)
        for _ in range(5):
            seen = await detector.detect(DETECTIONS)
            assert seen.pulse[-1] == light.last

    async with trio.open_nursery() as nursery:

        async def until_over(name: str, end: Callable[[], Awaitable[None]]) -> None:
            try:
                await end()
            except LinkError:
                over.append(name)
            nursery.cancel_scope.cancel()

        nursery.start_soon(relay, "requests", bobs_wire, alices_wire)
        nursery.start_soon(relay, "answers", alices_wire, bobs_wire)
        nursery.start_soon(until_over, "alice", partial(serve_detector, light, alice, most=1000))
        with trio.fail_after(1000):
            await until_over("bob", ask)
    assert bool(over) is (how != "held back")


@pytest.mark.parametrize("probability", [0.0, 1e-320, 1e-30, 1e-20, 1e-12])
def test_pulses_that_cannot_be_counted_are_refused(probability: float) -> None:
    """On the wire a gap has 32 bits; NumPy would make a negative number of a larger one."""
    with pytest.raises(LinkError, match="the loss is too high"):
        Randomness.seeded(1, "test").gaps(probability, 1000)
    assert Randomness.seeded(1, "test").gaps(1e-7, 1000).max() < 1 << 32


def test_pulses_of_a_long_dead_time_are_counted_or_refused() -> None:
    used = PRESETS["rusca2018"]
    channel = replace(used.channel, dead_time_s=1.0, repetition_rate_hz=1e12)
    for first, fits in ((0, True), (2**61, True), (2**62, False)):
        arguments = (channel, used.transmitter, channel, 100)
        if fits:
            _, seen = sample(*arguments, first=first, randomness=Randomness.seeded(1, "test"))
            assert (np.diff(seen.pulse) >= channel.dead_pulses).all()
            assert seen.pulse[0] >= first
        else:
            with pytest.raises(LinkError, match="2\\^62"):
                sample(*arguments, first=first, randomness=Randomness.seeded(1, "test"))
