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

Rows with different bases are allowed and are sifted out. Row ``i`` of both files is the same
detection. An ``.npz`` file (numpy, no pickles) has these arrays and ``settings``, a string of JSON;
a ``.parquet`` file has the columns, and the JSON as the value ``hybridkex`` of its metadata::

    {"source": {"intensities": [0.5, 0.2], "probabilities": [0.7, 0.3],
                "key_basis_probability": 0.9},
     "channel": {"receiver_efficiency": 0.2, ...},          fields of Channel
     "security": {"secrecy": 1e-9, "correctness": 1e-15}}   optional

The channel is what the decoy check compares with and what the clock is taken from.
"""

import io
import json
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio
from numpy.typing import NDArray

from hybridkex.errors import ConfigError, LinkError
from hybridkex.files import read_file, write_file
from hybridkex.json_text import load_json
from hybridkex.link.authentication import Signatures
from hybridkex.link.finite_key import Security
from hybridkex.link.ledger import LANE_RESERVE, Ledger
from hybridkex.link.party import Alice, Block, Bob
from hybridkex.link.physics import Channel, PairSource, Transmitter
from hybridkex.link.presets import Preset
from hybridkex.link.quantum import Detections, PulseRecord, Sent
from hybridkex.link.randomness import Randomness
from hybridkex.link.settings import LinkSettings
from hybridkex.link.simulated import stream_pair
from hybridkex.secret import Secret

__all__ = [
    "Measured",
    "alice_of",
    "bob_of",
    "distil",
    "read_measured",
    "settings_for",
    "write_measured",
]

Bits = NDArray[np.uint8]
MOST_ROWS: Final = 1 << 28
SETTINGS: Final = "settings"
PARQUET_KEY: Final = b"hybridkex"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One party's detections; see the module. Arrays of one length, one dimension.

    Raises ``ConfigError`` for arrays that cannot be this.
    """

    basis: Bits
    bit: Bits
    intensity: Bits | None = None
    """``None`` at Bob's end."""
    pulse: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        rows = len(self)
        if not 0 < rows <= MOST_ROWS:
            raise ConfigError(f"the number of detections lies between 1 and {MOST_ROWS}")
        for name, most in (("basis", 1), ("bit", 1), ("intensity", 3)):
            values = getattr(self, name)
            if values is None:
                continue
            values = np.asarray(values)
            if values.ndim != 1 or len(values) != rows:
                raise ConfigError(f"{name} is not one number for each of {rows} detections")
            if values.dtype.kind not in "uib" or int(values.min()) < 0 or int(values.max()) > most:
                raise ConfigError(f"{name} has values that are not integers from 0 to {most}")
            object.__setattr__(self, name, np.ascontiguousarray(values, dtype=np.uint8))
        if self.pulse is not None:
            pulse = np.asarray(self.pulse)
            if pulse.ndim != 1 or len(pulse) != rows or pulse.dtype.kind not in "ui":
                raise ConfigError(f"pulse is not one integer for each of {rows} detections")
            pulse = pulse.astype(np.int64)
            if int(pulse[0]) < 0 or (rows > 1 and int(np.diff(pulse).min()) <= 0):
                raise ConfigError("pulse does not increase from row to row")
            object.__setattr__(self, "pulse", pulse)

    def __len__(self) -> int:
        return int(np.asarray(self.basis).size)

    @property
    def numbers(self) -> NDArray[np.int64]:
        """Numbers of the pulses, or of the rows if pulses are not known."""
        return np.arange(len(self), dtype=np.int64) if self.pulse is None else self.pulse


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
    if measured.pulse is None and settings.decoy_check == "full":
        raise ConfigError(
            "without the numbers of the pulses the rate of detections cannot be checked: "
            'set decoy_check to "shares" or "off"'
        )
    rows = len(measured)
    return replace(settings, block_bits=max(1000, rows), block_detections=rows)


def alice_of(
    measured: Measured,
    settings: LinkSettings,
    stream: trio.abc.Stream,
    bootstrap: Ledger | Signatures,
    *,
    seed: int | None = None,
) -> Alice:
    """Alice for these detections, over a stream; see :class:`~hybridkex.link.party.Alice`."""
    if measured.intensity is None:
        raise ConfigError("Alice's detections have an intensity")
    record = PulseRecord(settings.preset.transmitter, Randomness.seeded(seed, "laser"))
    sent = Sent(
        intensity=measured.intensity.copy(), basis=measured.basis.copy(), bit=measured.bit.copy()
    )
    record.keep(measured.numbers, sent)
    chosen = settings_for(measured, settings)
    return Alice(stream, chosen, record, bootstrap=bootstrap, seed=seed)


def bob_of(
    measured: Measured,
    settings: LinkSettings,
    stream: trio.abc.Stream,
    bootstrap: Ledger | Signatures,
    *,
    seed: int | None = None,
) -> Bob:
    """Bob for these detections; see :func:`alice_of`."""
    chosen = settings_for(measured, settings)
    return Bob(stream, chosen, _Recorded(measured), bootstrap=bootstrap, seed=seed)


def distil(
    alice: Measured, bob: Measured, settings: LinkSettings, *, seed: int | None = None
) -> tuple[Block, Block]:
    """Make one block of keys of measured detections, with both parties in this process.

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
        BlockAborted: no key can be made of them.
    """
    if len(alice) != len(bob) or not (alice.numbers == bob.numbers).all():
        raise ConfigError("Alice's and Bob's rows are not the same detections")
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
        raise failures[0]
    return made[0], made[1]


# -- files


def _described(preset: Preset) -> str:
    found = {
        "source": asdict(preset.transmitter),
        "channel": asdict(preset.channel),
        "security": asdict(preset.security),
    }
    return json.dumps(found)


def _preset(text: str, name: str) -> Preset:
    try:
        found = load_json(text)
        source, channel = found["source"], found["channel"]
        kind = PairSource if "brightness" in source else Transmitter
        for made, given in ((kind, source), (Channel, channel)):
            unknown = set(given) - {one.name for one in fields(made)}
            if unknown:
                raise ConfigError(f"{name}: unknown settings: {', '.join(sorted(unknown))}")
        lists = {
            one: tuple(value) if isinstance(value, list) else value for one, value in source.items()
        }
        made_of: Any = kind
        return Preset(
            name=name,
            reference="measured",
            channel=Channel(**channel),
            transmitter=made_of(**lists),
            security=Security(**found.get("security", {})),
            efficiency=1.1,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name}: the settings are malformed: {error}") from None


def write_measured(path: Path, measured: Measured, preset: Preset) -> None:
    """Write an ``.npz`` or ``.parquet`` file, readable only by its owner, because it holds raw key.

    Raises ``ConfigError`` and ``OSError``.
    """
    arrays = {
        one: getattr(measured, one)
        for one in ("pulse", "basis", "bit", "intensity")
        if getattr(measured, one) is not None
    }
    content = io.BytesIO()
    if path.suffix == ".npz":
        np.savez_compressed(content, **arrays, settings=np.array(_described(preset)))
    else:
        _, parquet, arrow = _pyarrow(path)
        table = arrow.table(arrays)
        table = table.replace_schema_metadata({PARQUET_KEY: _described(preset).encode()})
        parquet.write_table(table, content)
    write_file(path, content.getvalue())


def read_measured(path: Path) -> tuple[Measured, Preset]:
    """Detections of one party, and the settings of their link. Raises ``ConfigError``."""
    try:
        found = _read_npz(path) if path.suffix == ".npz" else _read_parquet(path)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror or error}") from None
    settings = found.pop(SETTINGS, None)
    if settings is None:
        raise ConfigError(f"{path}: the settings are missing")
    known = {one.name for one in fields(Measured)}
    for name in set(found) - known:
        raise ConfigError(f"{path}: unknown array {name!r}")
    for name in ("basis", "bit"):
        if name not in found:
            raise ConfigError(f"{path}: the array {name!r} is missing")
    try:
        return Measured(**found), _preset(settings, path.name)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _content(path: Path) -> io.BytesIO:
    return io.BytesIO(read_file(path, limit=16 * MOST_ROWS, pipe=False))


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        content = _content(path)
        with zipfile.ZipFile(content) as archive:
            size = sum(one.file_size for one in archive.infolist())
        if size > 16 * MOST_ROWS:
            raise ConfigError(f"{path}: too large: {size} bytes when unpacked")
        with np.load(content, allow_pickle=False) as arrays:
            found: dict[str, Any] = {name: arrays[name] for name in arrays.files}
    except (zipfile.BadZipFile, ValueError, KeyError, EOFError, NotImplementedError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not an .npz file of detections: {error}") from None
    if SETTINGS in found:
        found[SETTINGS] = str(found[SETTINGS])
    return found


def _read_parquet(path: Path) -> dict[str, Any]:
    error_type, parquet, _ = _pyarrow(path)
    try:
        with parquet.ParquetFile(_content(path)) as file:
            rows = file.metadata.num_rows
            if rows > MOST_ROWS:
                raise ConfigError(f"{path}: too large: {rows} rows")
            table = file.read()
        found: dict[str, Any] = {name: table.column(name).to_numpy() for name in table.column_names}
    except error_type as error:
        raise ConfigError(f"{path}: not a Parquet file of detections: {error}") from None
    text = (table.schema.metadata or {}).get(PARQUET_KEY)
    if text is not None:
        found[SETTINGS] = text.decode(errors="replace")
    return found


def _pyarrow(path: Path) -> tuple[type[Exception], Any, Any]:
    if path.suffix != ".parquet":
        raise ConfigError(f"{path}: detections are in .npz or .parquet files")
    try:
        import pyarrow  # noqa: PLC0415  # an extra
        import pyarrow.parquet  # noqa: PLC0415
    except ModuleNotFoundError:
        raise ConfigError("Parquet files need pyarrow: pip install 'hybridkex[parquet]'") from None
    return pyarrow.ArrowException, pyarrow.parquet, pyarrow
