"""``hybridkex qkd record`` and ``distil``: detections in files."""

import secrets
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Final

import trio

from hybridkex.cli.qkd_data import DistilOptions, RecordOptions
from hybridkex.cli.running import run_trio
from hybridkex.cli.tcp import NO_TCP, cannot_connect, opening
from hybridkex.errors import ConfigError, LinkError
from hybridkex.files import reserve_file
from hybridkex.link.authentication import Signatures
from hybridkex.link.greeting import CLASSICAL, NUMBER, greet, greeted
from hybridkex.link.ledger import Direction
from hybridkex.link.measured import (
    MARKER,
    SUFFIXES,
    Measured,
    alice_of,
    bob_of,
    check_unused,
    distil,
    mark_used,
    read_measured,
    write_measured,
)
from hybridkex.link.optimise import NoKeyError, tuned
from hybridkex.link.party import Block
from hybridkex.link.presets import preset
from hybridkex.link.quantum import OpticalLink
from hybridkex.link.ranges import file_kind
from hybridkex.link.settings import MOST_DETECTIONS, LinkSettings
from hybridkex.machine import writing
from hybridkex.net.address import TcpAddress, parse_tcp_address
from hybridkex.net.budget import Budget, Connection
from hybridkex.net.listening import open_tcp_listeners
from hybridkex.net.reading import EndOfStream
from hybridkex.net.supervisor import Supervisor
from hybridkex.text import get_logger, json_line

LOG: Final = get_logger("hybridkex.cli.qkd_data")

WAIT: Final = 60.0
"""Seconds that one end waits for the other."""


def record(options: RecordOptions) -> int:
    if not 1 <= options.detections <= MOST_DETECTIONS:
        raise ConfigError(f"--detections must be between 1 and {MOST_DETECTIONS:,}")
    ending = ".parquet" if options.parquet else ".npz"
    alice, bob = (options.output / f"{name}{ending}" for name in ("alice", "bob"))
    for path in (alice, bob):
        file_kind(path, "detections", SUFFIXES)
        _check_new(path)
    chosen = preset(options.preset).at(options.distance)
    if not options.as_published:
        try:
            chosen = tuned(chosen, max(1000, options.detections // 2))
        except NoKeyError:
            raise ConfigError(
                f"{chosen.name} makes no key over {options.distance:g} km of {options.detections} "
                "detections; shorten the fibre, raise --detections, or use --as-published"
            ) from None
    light = OpticalLink(chosen.channel, chosen.transmitter, seed=options.seed)
    seen = run_trio(partial(light.detect, options.detections))
    sent = light.record.recall(seen.pulse)
    with writing(options.output):
        options.output.mkdir(exist_ok=True)
        for path, measured in (
            (
                alice,
                Measured(
                    pulse=seen.pulse, basis=sent.basis, bit=sent.bit, intensity=sent.intensity
                ),
            ),
            (bob, Measured(pulse=seen.pulse, basis=seen.basis, bit=seen.bit)),
        ):
            write_measured(path, measured, chosen)
            print(path)
    return 0


def run_distil(options: DistilOptions) -> int:
    if len(options.files) > 2:
        raise ConfigError("give the file of one party, or the files of both")
    if len(options.files) == 2 and (
        options.listen or options.connect or options.key or options.peer
    ):
        raise ConfigError(
            "with the files of both parties, both run here: leave out --listen, --connect, --key "
            "and --peer, or give one file"
        )
    read = [read_measured(path) for path in options.files]
    if len(read) == 2 and read[0][1].parameters != read[1][1].parameters:
        raise ConfigError("the settings in the two files differ: both are of one link")
    rows = len(read[0][0])
    settings = LinkSettings(
        preset=read[0][1],
        block_bits=max(1000, rows),
        block_detections=rows,
        key_bits=options.key_bits,
        decoy_check=options.decoy_check,
        bit_check=options.bit_check,
        finite_key=options.finite_key,
        leak=options.leak,
    )
    measured = [one for one, _ in read]
    if options.keys is not None:
        _check_new(options.keys)
    if options.keys is not None or len(read) == 1:
        for path in options.files:
            check_unused(path)
    try:
        # The room is taken first: the other end's keys are worth nothing if ours cannot be kept.
        with _kept(options, measured) as keep:
            block = (
                _both(measured, settings)
                if len(measured) == 2
                else run_trio(partial(_one, measured[0], settings, options))
            )
            if block.keys and options.keys is not None:
                if len(measured) == 2:
                    mark_used(*options.files)
                keep("".join(f"{one.key_id} {one.key.reveal().hex()}\n" for one in block.keys))
    except LinkError as error:
        print(json_line({"keys": 0, "aborted": str(error)}))
        return 1
    clock = settings.preset.channel.repetition_rate_hz  # which a file may leave out
    of_time = {"repetition_rate_hz": None if block.seconds is None else clock}
    print(json_line({**block.numbers, **of_time}))
    return 0 if block.keys else 1


def _check_new(path: Path) -> None:
    """Keys and measured detections cannot be made again. Raises ``ConfigError``."""
    if path.is_file():
        raise ConfigError(f"{path} exists already and is not replaced: choose another name")
    if path.name.endswith(MARKER):
        raise ConfigError(f"{path} would mark detections as used: choose another name for the file")


@contextmanager
def _kept(options: DistilOptions, measured: list[Measured]) -> Iterator[Callable[[str], None]]:
    """Room for the lines of all keys that the detections could give, in the file for them."""
    if options.keys is None:
        yield lambda lines: None
        return
    most = min(len(one.bit) for one in measured) // options.key_bits + 1
    key_line = len(f"{uuid.UUID(int=0)} \n") + 2 * ((options.key_bits + 7) // 8)
    path = options.keys
    with ExitStack() as stack:
        with writing(path):
            write = stack.enter_context(reserve_file(path, most * key_line))

        def keep(lines: str) -> None:
            with writing(path):
                write(lines.encode())

        yield keep


def _both(measured: list[Measured], settings: LinkSettings) -> Block:
    measured.sort(key=lambda one: one.intensity is None)
    if measured[0].intensity is None or measured[1].intensity is not None:
        raise ConfigError("one of the two files must be Alice's and the other Bob's")
    return distil(measured[0], measured[1], settings)[1]


async def _one(measured: Measured, settings: LinkSettings, options: DistilOptions) -> Block:
    if options.key is None or options.peer is None or not (options.listen or options.connect):
        raise ConfigError("with one file, give --listen or --connect, --key and --peer")
    address = parse_tcp_address(options.connect or options.listen or "")
    if not address.port:
        raise ConfigError("--listen and --connect need a port other than 0, the same at both ends")
    signatures = Signatures.from_files(options.key, options.peer)
    commit = partial(mark_used, options.files[0])
    make = bob_of if measured.intensity is None else alice_of
    sends = Direction.BOB_TO_ALICE if measured.intensity is None else Direction.ALICE_TO_BOB
    if options.connect:
        stream = await _connected(address, signatures, sends)
        async with stream:
            return await make(measured, settings, stream, signatures, commit=commit).block()
    with opening(address):
        listeners = await open_tcp_listeners(address.port, host=address.host)
    desk = _Desk(signatures, Direction(1 - sends))
    supervisor = Supervisor(desk.receive, name="QKD distillation", logger=LOG)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervisor.serve, listeners)
        try:
            stream = await desk.other_end()
            return await make(measured, settings, stream, signatures, commit=commit).block()
        finally:
            nursery.cancel_scope.cancel()


class _Desk:
    """Accepts only the other end of the link."""

    def __init__(self, signatures: Signatures, receives: Direction) -> None:
        self._signatures = signatures
        self._receives = receives
        self._one = Budget(1)
        self._refused = ""
        self._put, self._take = trio.open_memory_channel[trio.SocketStream](1)

    async def receive(self, stream: trio.SocketStream, connection: Connection) -> None:
        try:
            await greeted(stream, self._signatures, receives=self._receives)
        except LinkError as error:
            self._refused = f"; a connection was refused: {error}"
            raise
        connection.admit(self._one)
        self._put.send_nowait(stream)
        await trio.sleep_forever()  # until the block is made

    async def other_end(self) -> trio.SocketStream:
        """Its connection. Raises ``LinkError``."""
        try:
            with trio.fail_after(WAIT):
                return await self._take.receive()
        except trio.TooSlowError:
            raise LinkError(
                f"the other end did not connect within {WAIT:.0f} seconds{self._refused}"
            ) from None


async def _connected(
    there: TcpAddress, signatures: Signatures, sends: Direction
) -> trio.SocketStream:
    """A connection on which the other end knows who we are. Raises ``ChannelFailed``."""
    patience = trio.current_time() + WAIT
    while True:
        try:
            stream = await trio.open_tcp_stream(there.host, there.port)
        except NO_TCP as error:
            if trio.current_time() > patience or isinstance(error, UnicodeError):
                raise cannot_connect(there, error) from None
            await trio.sleep(1.0)
            continue
        try:
            with trio.fail_after(WAIT):
                await greet(stream, signatures, CLASSICAL, secrets.token_bytes(NUMBER), sends=sends)
        except (trio.TooSlowError, trio.BrokenResourceError, EndOfStream):
            await trio.aclose_forcefully(stream)
            raise LinkError(
                f"{there} does not greet us: is it the other end, with 'qkd distil --listen'?"
            ) from None
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
