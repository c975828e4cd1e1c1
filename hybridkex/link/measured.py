"""Measured detections in place of simulated light: files, checks, and both ends of the link.

A file has what one party knows, one row for each detection:

=============  ==========  =======================================================================
name           both        meaning
=============  ==========  =======================================================================
``basis``      yes         0: key basis, 1: test basis; the basis in which Alice sent, or in
                           which Bob measured
``bit``        yes         0 or 1
``intensity``  Alice       index of the chosen intensity, 0 is the brightest; 0 for pairs
``pulse``      optional    number of the pulse, strictly increasing; both or neither have it
=============  ==========  =======================================================================

Pulses may be counted from anywhere: the block begins with the first one in the file and ends with
the last. Without them nobody knows how long the light was on, so the block has no number of pulses,
no time and no rate, and the rate of detections cannot be checked.

Rows with different bases are allowed and are sifted out. Row ``i`` of both files is the same
detection. An ``.npz`` file (numpy, no pickles) has these arrays and ``settings``, a string of JSON;
a ``.parquet`` file has the columns, and the JSON as the value ``hybridkex`` of its metadata, with
its SHA-256 in hexadecimal digits as ``hybridkex_sha256``, which may be left out::

    {"source": {"intensities": [0.5, 0.2], "probabilities": [0.7, 0.3],
                "key_basis_probability": 0.9},
     "channel": {"receiver_efficiency": 0.2, ...},          fields of Channel
     "security": {"secrecy": 1e-9, "correctness": 1e-15}}   optional

The decoy check compares the detections with the channel, and the clock rate comes from it. A field
that is left out has the default of :class:`~hybridkex.link.physics.Channel`: a clock of 1 GHz, for
example.
"""

import contextlib
import hashlib
import io
import json
import math
import os
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio
from numpy.typing import NDArray

from hybridkex.errors import ConfigError, LinkError
from hybridkex.files import create_file, parsing, read_file, try_writing, write_file
from hybridkex.json_text import load_json
from hybridkex.link.authentication import Signatures
from hybridkex.link.finite_key import Security
from hybridkex.link.ledger import LANE_RESERVE, Ledger
from hybridkex.link.party import Alice, Block, Bob, cause
from hybridkex.link.physics import Channel, PairSource, Transmitter
from hybridkex.link.presets import Preset
from hybridkex.link.quantum import Detections, PulseRecord, Sent
from hybridkex.link.randomness import Randomness
from hybridkex.link.ranges import file_kind, instance
from hybridkex.link.settings import MOST_DETECTIONS, LinkSettings
from hybridkex.link.simulated import stream_pair
from hybridkex.link.wire import OtherDetections
from hybridkex.machine import reason
from hybridkex.secret import Secret

Bits = NDArray[np.uint8]
ARRAYS: Final = ("basis", "bit", "intensity", "pulse")
SUFFIXES: Final = (".npz", ".parquet")
SETTINGS: Final = "settings"
MOST_SETTINGS: Final = 1 << 20
LONGEST_HEADER: Final = 4096
"""The maximum length in bytes of an array's header in an archive; numpy writes 128."""
PARTS: Final = ("source", "channel", "security")
MARKER: Final = ".distilled"
"""Suffix of the marker of a file of detections that have been used."""
PARQUET_KEY: Final = b"hybridkex"
PARQUET_DIGEST: Final = b"hybridkex_sha256"
"""Parquet has checksums of its pages, but none of its metadata."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One party's detections; see the module. Arrays of one length, one dimension, or lists.

    Raises ``ConfigError`` for other arrays.
    """

    basis: Bits
    bit: Bits = field(repr=False)
    """The raw key: it is not shown."""
    intensity: Bits | None = None
    """The index of the intensity of each pulse; ``None`` at Bob's end."""
    pulse: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        rows = len(self)
        if not 0 < rows <= MOST_DETECTIONS:
            raise ConfigError(f"the number of detections lies between 1 and {MOST_DETECTIONS:,}")
        for name, most in (("basis", 1), ("bit", 1), ("intensity", 3)):
            given = getattr(self, name)
            if given is None and name == "intensity":
                continue
            values = _array(name, given)
            if values.ndim != 1 or len(values) != rows:
                raise ConfigError(f"{name} is not one number for each of {rows} detections")
            if values.dtype.kind not in "uib" or int(values.min()) < 0 or int(values.max()) > most:
                raise ConfigError(f"{name} has values that are not integers from 0 to {most}")
            object.__setattr__(self, name, np.ascontiguousarray(values, dtype=np.uint8))
        if self.pulse is not None:
            pulse = _array("pulse", self.pulse)
            if pulse.ndim != 1 or len(pulse) != rows or pulse.dtype.kind not in "ui":
                raise ConfigError(f"pulse is not one integer for each of {rows} detections")
            if not 0 <= int(pulse.min()) <= int(pulse.max()) < 1 << 62:
                raise ConfigError("pulse has numbers that are not from 0 to 2^62 - 1")
            pulse = pulse.astype(np.int64)
            if rows > 1 and int(np.diff(pulse).min()) <= 0:
                raise ConfigError("pulse does not increase from row to row")
            object.__setattr__(self, "pulse", pulse)

    def __len__(self) -> int:
        return int(_array("basis", self.basis).size)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Numbers of the pulses, or of the rows if pulses are not known."""
        return np.arange(len(self), dtype=np.int64) if self.pulse is None else self.pulse

    @property
    def first_pulse(self) -> int | None:
        """Number of the first pulse; ``None`` if pulses are not known."""
        return None if self.pulse is None else int(self.pulse[0])


def _array(name: str, values: Any) -> NDArray[Any]:
    """Raises ``ConfigError`` for what is not an array with a value in every row."""
    if np.ma.is_masked(values):
        raise ConfigError(f"{name} has masked rows; leave these rows out of all arrays")
    try:
        return np.asarray(values)
    except ValueError:  # lists within lists, of different lengths
        raise ConfigError(f"{name} is not one number for each detection") from None


class _Record(PulseRecord):
    """Alice's record of measured detections: no other pulse was detected."""

    def recall(self, pulse: NDArray[np.int64]) -> Sent:
        if not np.isin(pulse, self._pulse, assume_unique=True).all():
            raise OtherDetections(
                "the other end reports pulses that Alice's detections do not have: the two files "
                "are not of the same detections"
            )
        return super().recall(pulse)


class _Recorded:
    """Bob's detector: returns the measured detections once."""

    def __init__(self, measured: Measured) -> None:
        self._measured = measured

    async def detect(self, count: int) -> Detections:
        measured = self._measured
        if count != len(measured):
            raise ConfigError(f"{len(measured)} detections were measured, {count} are needed")
        await trio.lowlevel.checkpoint()
        return Detections(
            pulse=measured.numbers, basis=measured.basis.copy(), bit=measured.bit.copy()
        )


def settings_for(measured: Measured, settings: LinkSettings) -> LinkSettings:
    """The settings for one block of all measured detections.

    Raises ``ConfigError``, also where the decoy check wants the pulses' numbers and they are not
    there: set ``decoy_check`` to ``shares`` or ``off``.
    """
    instance("settings", settings, LinkSettings)
    if measured.pulse is None and settings.decoy_check == "full":
        raise ConfigError(
            "without the numbers of the pulses the rate of detections cannot be checked: "
            'set decoy_check to "shares" or "off"'
        )
    rows = len(measured)
    return replace(settings, block_bits=max(1000, rows), block_detections=rows)


def _check_intensities(measured: Measured, preset: Preset) -> None:
    """Raises ``ConfigError`` for an intensity that the source does not have."""
    kinds = len(preset.transmitter.probabilities)
    if measured.intensity is not None and int(measured.intensity.max()) >= kinds:
        raise ConfigError(
            f"intensity has the index {int(measured.intensity.max())}, and the source has only "
            f"{kinds}, counted from 0"
        )


def alice_of(
    measured: Measured,
    settings: LinkSettings,
    stream: trio.abc.Stream,
    bootstrap: Ledger | Signatures,
    *,
    seed: int | None = None,
    commit: Callable[[], None] | None = None,
) -> Alice:
    """Alice for these detections, over a stream; see :class:`~hybridkex.link.party.Alice`.

    There is one block, so none of its key is kept to authenticate another, beyond what a ledger in
    ``bootstrap`` asks for. Detections must not be used a second time once ``commit`` was called:
    for those of a file, ``partial(mark_used, path)`` keeps that in mind. Raises ``ConfigError``.
    """
    instance("measured", measured, Measured)
    if measured.intensity is None:
        raise ConfigError("Alice's detections have an intensity")
    instance("settings", settings, LinkSettings)
    _check_intensities(measured, settings.preset)
    record = _Record(settings.preset.transmitter, Randomness.seeded(seed, "laser"))
    sent = Sent(
        intensity=measured.intensity.copy(), basis=measured.basis.copy(), bit=measured.bit.copy()
    )
    record.keep(measured.numbers, sent)
    chosen = settings_for(measured, settings)
    return Alice(
        stream,
        chosen,
        record,
        bootstrap=bootstrap,
        ledger=Ledger(reserve=0),
        seed=seed,
        first_pulse=measured.first_pulse,
        commit=commit,
    )


def bob_of(
    measured: Measured,
    settings: LinkSettings,
    stream: trio.abc.Stream,
    bootstrap: Ledger | Signatures,
    *,
    seed: int | None = None,
    commit: Callable[[], None] | None = None,
) -> Bob:
    """Bob for these detections; see :func:`alice_of`."""
    instance("measured", measured, Measured)
    if measured.intensity is not None:
        raise ConfigError("these detections have an intensity: they are Alice's, not Bob's")
    chosen = settings_for(measured, settings)
    return Bob(
        stream,
        chosen,
        _Recorded(measured),
        bootstrap=bootstrap,
        ledger=Ledger(reserve=0),
        seed=seed,
        first_pulse=measured.first_pulse,
        commit=commit,
    )


def distil(
    alice: Measured, bob: Measured, settings: LinkSettings, *, seed: int | None = None
) -> tuple[Block, Block]:
    """Make one block of keys of measured detections, with both parties in this process.

    Several runs with the same detections may be compared, but the keys of only one may be used: all
    of them together are longer than what Eve does not know.

    Args:
        alice: what Alice sent, for each detection.
        bob: what Bob measured; row ``i`` is the same detection as in ``alice``.
        settings: ``block_bits`` is replaced: all key-basis detections are used. The bound is that
            of ``settings.preset.transmitter``; ``decoy_check`` says what is compared with
            ``settings.preset.channel``.
        seed: to repeat a run; its keys are worth nothing.

    Returns:
        What Alice has and what Bob has. Keys of ``settings.key_bits`` bits, and the numbers.

    Raises:
        ConfigError: the arrays do not belong together.
        LinkError: no key can be made of them; ``BlockAborted`` or ``NotRandom`` says why not.
        RuntimeError: called within trio; use :func:`alice_of` and :func:`bob_of` there.
    """
    instance("alice", alice, Measured)
    instance("bob", bob, Measured)
    if len(alice) != len(bob):
        raise ConfigError(f"Alice has {len(alice)} detections and Bob {len(bob)}")
    if (alice.pulse is None) != (bob.pulse is None):
        raise ConfigError("only one of Alice and Bob has the numbers of the pulses")
    if not (alice.numbers == bob.numbers).all():
        raise ConfigError("Alice's and Bob's rows are not the same detections: their pulses differ")
    return trio.run(partial(_distil, alice, bob, settings, seed))


async def _distil(
    alice: Measured, bob: Measured, settings: LinkSettings, seed: int | None
) -> tuple[Block, Block]:
    shared = Secret(Randomness.seeded(seed, "shared secret").bytes(2 * LANE_RESERVE))
    near, far = stream_pair()
    made: dict[int, Block] = {}
    failures: list[LinkError] = []

    async def play(number: int) -> None:
        try:
            made[number] = await parties[number].block()
        except LinkError as error:  # raised below, without the nursery's group
            failures.append(error)
            await (near, far)[number].aclose()

    async with near, far:
        parties = (
            alice_of(alice, settings, near, Ledger(shared), seed=seed),
            bob_of(bob, settings, far, Ledger(shared), seed=seed),
        )
        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(play, number)
    if failures:
        raise cause(failures)
    return made[0], made[1]


# -- files


def _described(preset: Preset) -> str:
    found = {
        "source": asdict(preset.transmitter),
        "channel": asdict(preset.channel),
        "security": asdict(preset.security),
    }
    return json.dumps(found)


def _part(given: Any, name: str, kind: type[Any]) -> Any:
    """An object of this class from JSON. Raises ``ConfigError``."""
    if not isinstance(given, dict):
        raise ConfigError(f"the settings have no object {name!r}")
    known = {one.name: one for one in fields(kind)}
    if unknown := set(given) - set(known):
        raise ConfigError(f"{name!r} has unknown names: {', '.join(sorted(unknown))}")
    needed = {one for one in known if known[one].default is MISSING}
    if missing := needed - set(given):
        raise ConfigError(f"the settings lack in {name!r}: {', '.join(sorted(missing))}")
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})


def _source(given: Any) -> Any:
    """The source, of the kind whose settings these are. Raises ``ConfigError``."""
    laser, pairs = ({one.name for one in fields(kind)} for kind in (Transmitter, PairSource))
    names = set(given) if isinstance(given, dict) else set()
    of_laser, of_pairs = (", ".join(sorted(names & one)) for one in (laser - pairs, pairs - laser))
    if of_laser and of_pairs:
        raise ConfigError(
            f"'source' has settings of laser pulses ({of_laser}) and of pairs ({of_pairs}): leave "
            "out those of one of them"
        )
    return _part(given, "source", PairSource if of_pairs else Transmitter)


def _preset(text: str, name: str) -> Preset:
    try:
        found = load_json(text, most_values=None)
    except ValueError as error:
        raise ConfigError(f"the settings are not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ConfigError("the settings are not a JSON object")
    if unknown := sorted(set(found) - set(PARTS)):
        raise ConfigError(
            f"the settings have an unknown object: {', '.join(unknown)}; use {', '.join(PARTS)}"
        )
    return Preset(
        name=name,
        reference="measured",
        channel=_part(found.get("channel"), "channel", Channel),
        transmitter=_source(found.get("source")),
        security=_part(found.get("security", {}), "security", Security),
        efficiency=1.1,
    )


def write_measured(path: Path | str, measured: Measured, preset: Preset) -> None:
    """Write an ``.npz`` or ``.parquet`` file, readable only by its owner, because it holds raw key.

    Raises ``ConfigError`` and ``OSError``.
    """
    path = Path(path)
    kind = file_kind(path, "detections", SUFFIXES)
    instance("preset", preset, Preset)
    instance("measured", measured, Measured)
    arrays = {one: array for one in ARRAYS if (array := getattr(measured, one)) is not None}
    content = io.BytesIO()
    if kind == ".npz":
        np.savez_compressed(content, **arrays, settings=np.array(_described(preset)))
    else:
        import pyarrow.parquet  # noqa: PLC0415  # an extra

        table = pyarrow.table(arrays)
        text = _described(preset).encode()
        table = table.replace_schema_metadata({PARQUET_KEY: text, PARQUET_DIGEST: _digest(text)})
        pyarrow.parquet.write_table(table, content, write_page_checksum=True)
    write_file(path, content.getvalue())


def read_measured(path: Path | str) -> tuple[Measured, Preset]:
    """Detections of one party, and the settings of their link. Raises ``ConfigError``."""
    path = Path(path)
    kind = file_kind(path, "detections", SUFFIXES)
    content = io.BytesIO(read_file(path, limit=16 * MOST_DETECTIONS, pipe=False))
    read = _read_npz if kind == ".npz" else _read_parquet
    with parsing(path, f"{'an .npz' if kind == '.npz' else 'a Parquet'} file of detections"):
        found = read(content)
        settings = found.pop(SETTINGS, None)
        if settings is None:
            where = "an array" if kind == ".npz" else "a value of the file's metadata"
            name = SETTINGS if kind == ".npz" else PARQUET_KEY.decode()
            raise ConfigError(f"the settings are missing; add {where} called {name!r}")
        for name in ("basis", "bit"):
            if name not in found:
                raise ConfigError(f"the array {name!r} is missing")
        measured, chosen = Measured(**found), _preset(settings, path.name)
        _check_intensities(measured, chosen)
    return measured, chosen


def _marker(path: Path | str) -> Path:
    real = Path(path).resolve()
    return real.with_name(f"{real.name}{MARKER}")


def check_unused(path: Path | str) -> None:
    """Whether no keys were made of the detections in this file, and the next use can be marked.

    Raises ``ConfigError``.
    """
    try:
        os.stat(path)
        marker = _marker(path)
        try:
            os.lstat(marker)
        except FileNotFoundError:
            try_writing(marker, b"a trial\n")
            return
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: links that form a ring
        raise ConfigError(
            f"the file that marks the detections in {path} as used cannot be created beside them: "
            f"{reason(error)}; move them to a folder that you can write to, or rename them"
        ) from None
    raise ConfigError(
        f"the detections in {path} have been used, as {marker.name} beside them says, and a second "
        "run would disclose more about the same keys: record new detections. Remove that file only "
        "if it belongs to other detections"
    )


def mark_used(*paths: Path | str) -> None:
    """Mark the detections in files as used, by a file beside each; see :func:`check_unused`. All
    are marked or none.

    Raises ``LinkError`` if one is marked already, or cannot be, or does not exist.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    with contextlib.ExitStack() as undo:
        for path in paths:
            try:
                os.stat(path)
                marker = _marker(path)
                create_file(marker, f"'hybridkex qkd distil' used {path} at {now}.\n".encode())
            except (OSError, ValueError, RuntimeError) as error:
                raise LinkError(
                    f"the detections in {path} are not used, because the file that marks them as "
                    f"used cannot be created beside them: {reason(error)}"
                ) from None
            undo.callback(marker.unlink)
        undo.pop_all()


def _check_names(names: Sequence[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            index = name.startswith("__index_level_")
            raise ConfigError(
                f"unknown array {name!r}; detections have {', '.join(known)}"
                + ("; in pandas, write the file with index=False" if index else "")
            )
        if names.count(name) > 1:
            raise ConfigError(f"there are two arrays {name!r}")


def _read_npz(content: io.BytesIO) -> dict[str, Any]:
    with zipfile.ZipFile(content) as archive:
        members = {one.filename.removesuffix(".npy"): one for one in archive.infolist()}
        names = [one.filename.removesuffix(".npy") for one in archive.infolist()]
        _check_names(names, (*ARRAYS, SETTINGS))
        for name, member in members.items():  # before anything is unpacked
            _check_header(archive, member, name)
        found: dict[str, Any] = {}
        for name, member in members.items():
            with archive.open(member) as file:
                found[name] = np.lib.format.read_array(file, allow_pickle=False)
    if SETTINGS in found:
        found[SETTINGS] = _text(found[SETTINGS])
    return found


def _text(array: NDArray[np.str_]) -> str:
    """A string in an array. Raises ``ValueError``; numpy itself would not check the characters."""
    order = "be" if array.dtype.str[0] == ">" else "le"
    return array.tobytes().decode(f"utf-32-{order}").rstrip("\0")


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str) -> None:
    """Check that a header fits this array. Raises ``ConfigError`` or ``ValueError``."""
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError("unsupported compression method: numpy writes stored or deflated archives")
    with archive.open(member) as file:
        start = io.BytesIO(file.read(LONGEST_HEADER))  # numpy reads a longer one before it objects
    old = np.lib.format.read_magic(start) == (1, 0)
    at, size = start.tell(), 2 if old else 4
    if int.from_bytes(start.getvalue()[at : at + size], "little") > LONGEST_HEADER - at - size:
        raise ConfigError(f"{name} has a header that is too long")
    read_header = (
        np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    )
    shape, _, dtype = read_header(start)
    if name == SETTINGS:
        if dtype.kind != "U" or shape or dtype.itemsize > MOST_SETTINGS:
            raise ConfigError("the settings are not one string of JSON")
    elif dtype.kind not in "uib":
        raise ConfigError(f"{name} has values of the type {dtype}, not integers")
    elif len(shape) != 1 or type(shape[0]) is not int or not 0 < shape[0] <= MOST_DETECTIONS:
        raise ConfigError(
            f"{name} has the shape {shape}; one row of 1 to {MOST_DETECTIONS:,} is needed"
        )
    if math.prod(shape) * dtype.itemsize > member.file_size:
        raise ConfigError(f"{name} is cut off: the file has less of it than it announces")


def _read_parquet(content: io.BytesIO) -> dict[str, Any]:
    import pyarrow.parquet  # noqa: PLC0415  # an extra

    with pyarrow.parquet.ParquetFile(content, page_checksum_verification=True) as file:
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        # These are the rows that are read, whatever the file says that it has of them.
        rows, schema = sum(one.num_rows for one in groups), file.schema_arrow
        # The footer's; Polars leaves them out of the schema that Arrow keeps there.
        metadata = file.metadata.metadata or {}
        _check_schema(rows, schema)
        table = file.read()
    found = {name: _column(table, name) for name in table.column_names}
    text = metadata.get(PARQUET_KEY)
    if text is not None:
        if metadata.get(PARQUET_DIGEST, _digest(text)) != _digest(text):
            raise ConfigError(
                "the settings are damaged: their digest differs; if you have changed them, leave "
                f"out the value {PARQUET_DIGEST.decode()!r}"
            )
        found[SETTINGS] = text.decode(errors="replace")
    return found


def _digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest().encode()


def _check_schema(rows: int, schema: Any) -> None:
    from pyarrow import types  # noqa: PLC0415

    if rows > MOST_DETECTIONS:
        raise ConfigError(f"{rows:,} detections, and at most {MOST_DETECTIONS:,} are taken")
    _check_names(schema.names, ARRAYS)
    for column in schema:
        kind = column.type
        if types.is_dictionary(kind):
            kind = kind.value_type
        if not (types.is_integer(kind) or types.is_boolean(kind)):
            raise ConfigError(f"{column.name} has values of the type {kind}, not integers")


def _column(table: Any, name: str) -> Any:
    column = table.column(name)
    if column.null_count:
        raise ConfigError(f"{name} has rows without a value; leave these rows out")
    return column.to_numpy()
