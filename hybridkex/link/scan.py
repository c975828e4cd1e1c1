"""Results of a link over a grid of settings; the rows do not depend on where they are computed.

A *point* names settings: ``preset``, ``distance_km``, ``block_bits``, ``eve``, ``finite_key``,
``leak``, ``tuned``, ``max_qber``, ``tolerance``, ``decoy_check``, or any field of the channel, the
source or the security. Each point is computed by itself, from the point and its own seed, so it
does not matter where and in which order: in this process, or with any executor of
:mod:`concurrent.futures`, such as a pool of processes or that of a Dask cluster.
"""

import csv
import hashlib
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import suppress
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Final

import trio

from hybridkex.errors import BlockAborted, ConfigError, LedgerDry, LinkError
from hybridkex.files import PUBLIC, parsing, read_file, read_utf8, write_file
from hybridkex.json_text import load_json
from hybridkex.link.eavesdroppers import eavesdropper
from hybridkex.link.finite_key import FINITE_KEY, expected_counts
from hybridkex.link.optimise import NoKeyError, tuned
from hybridkex.link.party import Block
from hybridkex.link.presets import Preset, preset
from hybridkex.link.ranges import (
    file_kind,
    instance,
    is_number,
    listed,
    plain,
    records,
    whole,
    within,
)
from hybridkex.link.settings import LEAKS, LinkSettings
from hybridkex.link.simulated import SimulatedLink, attack
from hybridkex.link.statistics import binary_entropy

Point = Mapping[str, Any]
Row = dict[str, Any]

OWN: Final = {
    "preset": "lim2014",
    "distance_km": 50.0,
    "block_bits": 1_000_000,
    "eve": None,
    "finite_key": FINITE_KEY[0],
    "leak": LEAKS[0],
    "tuned": True,
}
LIMITS: Final = ("max_qber", "tolerance", "decoy_check")
"""Settings of the protocol that a row has only if its point names them."""
SETTINGS: Final[Mapping[str, Any]] = {
    **{one.name: one.default for one in fields(LinkSettings) if one.name in LIMITS},
    **preset("bbm92").parameters,
    **preset("lim2014").parameters,
    **OWN,
}
"""The settings that can vary, each with a value of its type: :data:`OWN`, :data:`LIMITS`, and the
fields of the channel, of both kinds of source, and of the security."""
COLUMNS: Final = (
    "loss_db",
    "rate",
    "bit_per_s",
    "secret_bits",
    "qber",
    "phase_error",
    "leak_bits",
    "seconds",
    "blocks_made",
    "blocks_aborted",
)
"""Columns of a row in addition to its point: loss of the fibre (dB); secret bits per pulse and per
second; secret bits, QBER, phase error bound, leak and seconds of a block; blocks made and aborted.

``None``, an empty field of a file, stands for what is not known: the numbers of a block where no
settings with a key were found, or nothing is detected; QBER, phase error bound and leak where every
simulated block was aborted; the numbers of blocks where none was simulated."""
AMOUNTS: Final = ("rate", "bit_per_s", "secret_bits")
"""Columns that are 0 where there is no key."""
ERROR: Final = "error"
"""Column with the reason why a row has no results. Other rows do not have it."""
_ARROW: Final = {float: "float64", int: "int64", bool: "bool", str: "string", NoneType: "string"}
TYPES: Final = {
    **{name: _ARROW.get(type(example), "string") for name, example in SETTINGS.items()},
    **dict.fromkeys(COLUMNS, "float64"),
    **dict.fromkeys(("blocks_made", "blocks_aborted"), "int64"),
    ERROR: "string",
}
"""Types of Parquet of the columns, which may be empty in all rows; several numbers are text."""
SEARCHED: Final = ("intensities", "probabilities", "key_basis_probability", "brightness")
"""Settings that :func:`~hybridkex.link.optimise.tuned` chooses."""
NOTHING: Final = frozenset(
    (
        "", "-", "#n/a", "#n/a n/a", "#na", "-1.#ind", "-1.#qnan", "-nan", "1.#ind", "1.#qnan",
        "<na>", "missing", "n/a", "na", "nan", "nat", "none", "null",
    )
)  # fmt: skip
"""What other programs write where there is no value, in small letters: the words that
``pandas.read_csv`` takes for it, ``-``, and those of pandas' ``NaT`` and of Julia."""
MOST_POINTS: Final = 1_000_000
MOST_BLOCKS: Final = 1_000_000
"""The most blocks that are simulated at a point."""
MOST_VALUES: Final = 64 * MOST_POINTS
"""The most values of a file of rows, so that it does not take all of the machine's memory."""
MOST_BYTES: Final = 1 << 30
"""The largest file of rows: a million points have about 300 MB."""
SUFFIXES: Final = (".csv", ".parquet", ".json")
_ROWS: Final = 'JSON has a list of rows, as to_json(orient="records") in pandas writes it'
_POINT: Final = (
    "write numbers with a decimal point and without separators of thousands, no value as an empty "
    "field, and commas only between columns"
)
_THOUSANDS: Final = re.compile(r"[-+]?[1-9]\d{0,2}(\.\d{3})+")
"""Ten thousand in German or Spanish, which would be taken for ten."""


def grid(axes: Mapping[str, Sequence[Any]]) -> list[Row]:
    """Every combination of these values; the last axis changes fastest. Raises ``ConfigError``."""
    axes = {name: listed(name, values) for name, values in instance("axes", axes, dict).items()}
    if math.prod(map(len, axes.values())) > MOST_POINTS:
        raise ConfigError(f"a scan has at most {MOST_POINTS:,} points")
    for name in axes:
        _check_name(name)
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def _check_name(name: str) -> None:
    if name not in SETTINGS:
        raise ConfigError(
            f"unknown setting {name!r}: use {', '.join((*OWN, *LIMITS))} or a field of the "
            "channel, the source or the security"
        )


def _chosen(asked: Mapping[str, Any]) -> Preset:
    """The preset that a point asks for, before it is tuned."""
    chosen = preset(asked["preset"]).at(asked["distance_km"])
    for name in asked.keys() - OWN.keys() - {"efficiency", *LIMITS}:
        for part in ("channel", "transmitter", "security"):
            inner = getattr(chosen, part)
            if name in {one.name for one in fields(inner)}:
                chosen = replace(chosen, **{part: replace(inner, **{name: asked[name]})})
                break
        else:
            raise ConfigError(f"{chosen.name} has no setting {name!r}")
    return replace(chosen, efficiency=asked.get("efficiency", chosen.efficiency))


def _typed(name: str, value: Any) -> Any:
    """The value of a setting, of the setting's type. Raises ``ConfigError``."""
    _check_name(name)
    return _like(SETTINGS[name], name, plain(value))


def _like(example: Any, name: str, value: Any) -> Any:
    if isinstance(example, tuple):
        parts = value if isinstance(value, list | tuple) else [value]
        return tuple(_like(1.0, name, part) for part in parts)
    number = is_number(value)
    if isinstance(example, bool):
        fits, kind = isinstance(value, bool), "true or false"
    elif isinstance(example, int):
        fits, kind = number and abs(value) < 1 << 63 and value == int(value), "a whole number"
    elif isinstance(example, float):
        fits, kind = number and math.isfinite(value), "a number"
    else:
        fits, kind = isinstance(value, str) or value is example, "a word"
    if not fits:
        raise ConfigError(f"the setting {name} takes {kind}, not {value!r}")
    return type(example)(value) if number else value


def evaluate(point: Point, *, blocks: int = 0, seed: int = 0) -> Row:
    """The row of one point.

    ``blocks``: 0 for the expected block, by closed forms; else so many blocks are made by the whole
    protocol, and the row has their means. The closed forms have the limit of the QBER and no decoy
    check: a simulated block may be aborted where they have a rate. A point without a key has a rate
    of 0, and where the search for the best settings finds none, no block is simulated; see
    :data:`COLUMNS`. Raises ``ConfigError`` for impossible settings.
    """
    within("blocks", whole("blocks", blocks), 0, MOST_BLOCKS)
    (given,) = records("point", [point])
    asked = {**OWN, **{name: _typed(name, value) for name, value in given.items()}}
    if asked["eve"] == "none":
        asked["eve"] = None
    row = {**asked, **dict.fromkeys(COLUMNS), **dict.fromkeys(AMOUNTS, 0)}
    chosen, bits, eve = _chosen(asked), asked["block_bits"], asked["eve"]
    row["loss_db"] = chosen.channel.attenuation_db_per_km * chosen.channel.distance_km
    # What cannot be is refused before the search, which takes long and may find no key.
    settings = LinkSettings(
        preset=chosen,
        block_bits=bits,
        block_detections=bits,
        finite_key=asked["finite_key"],
        leak=asked["leak"],
        **{name: asked[name] for name in LIMITS if name in asked},
    )
    if eve is not None:
        (attack if blocks else eavesdropper)(eve, chosen.channel, chosen.transmitter)
    if asked["tuned"]:
        for name in SEARCHED:
            if name in given:
                raise ConfigError(
                    f"the search for the best settings replaces {name}: set tuned to false"
                )
        try:
            chosen = tuned(chosen, bits, finite_key=asked["finite_key"])
        except NoKeyError:
            return row
    settings = replace(settings, preset=chosen, block_detections=None)
    row |= _simulated(settings, eve, int(blocks), seed) if blocks else _expected(settings, eve)
    return row


def _expected(settings: LinkSettings, eve: str | None) -> Row:
    chosen = settings.preset
    channel, source = chosen.channel, chosen.transmitter
    light = None if eve is None else eavesdropper(eve, channel, source)
    gain = sum(
        p * seen
        for (seen, _), p in zip(source.response(channel, light), source.probabilities, strict=True)
    )
    if gain <= 0.0:
        return {}
    detections = settings.block_bits / source.key_basis_probability**2
    alive = detections / gain
    counts = expected_counts(channel, source, alive, light)
    parities = chosen.efficiency * settings.block_bits * binary_entropy(counts.key_error_rate)
    leak = settings.leaked(counts, disclosed=math.ceil(parities), announced=math.ceil(parities))
    length = settings.proof.secret_length(
        source, counts, security=chosen.security, leak=float(leak)
    )
    pulses = alive + detections * channel.dead_pulses
    real = max(0.0, length.real)
    if counts.test_error_rate > settings.max_qber:
        real = 0.0
    return {
        "rate": real / pulses,
        "bit_per_s": real / pulses * channel.repetition_rate_hz,
        "secret_bits": real,
        "qber": counts.key_error_rate,
        "phase_error": length.phase_error,
        "leak_bits": leak,
        "seconds": pulses / channel.repetition_rate_hz,
    }


def _simulated(settings: LinkSettings, eve: str | None, blocks: int, seed: int) -> Row:
    async def run() -> Row:
        made: list[Block] = []
        done, seconds, timed = 0, 0.0, True
        for number in itertools.count():
            # A link that stops is begun again, as an operator would do it.
            link = SimulatedLink(settings, eve=eve, seed=_seed(seed, number) if number else seed)
            async with link.open():
                try:
                    while done < blocks:
                        before = link.seconds
                        with suppress(BlockAborted):
                            made.append((await link.block())[1])
                        done += 1
                except LedgerDry:  # no block was begun
                    pass
                except LinkError:
                    done += 1
                    timed = timed and link.seconds > before  # else no pulse was detected
                seconds += link.seconds
            if done == blocks:
                break
        secret = sum(one.secret_bits for one in made)
        bit_per_s = 0.0 if not secret else secret / seconds if timed else None
        return {
            "rate": bit_per_s and bit_per_s / settings.preset.channel.repetition_rate_hz,
            "bit_per_s": bit_per_s,
            "secret_bits": secret / blocks,
            "qber": _mean([one.qber for one in made]),
            "phase_error": _mean([one.phase_error for one in made]),
            "leak_bits": _mean([one.leak for one in made]),
            "seconds": seconds / blocks if timed else None,
            "blocks_made": len(made),
            "blocks_aborted": blocks - len(made),
        }

    return trio.run(run)


def _mean(values: Sequence[float | None]) -> float | None:
    """``None`` if there are no values, or not all are known."""
    known = [one for one in values if one is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def _evaluated(point: Point, *, blocks: int, seed: int) -> Row:
    """Call :func:`evaluate`; the row of an impossible point gives the reason.

    A setting that is not of its type is empty there: columns have one type in all formats.
    """
    try:
        return evaluate(point, blocks=blocks, seed=seed)
    except ConfigError as error:
        named = ", ".join(f"{name}={plain(value)}" for name, value in point.items())
        row = {**OWN, **dict.fromkeys(point), **dict.fromkeys(COLUMNS), ERROR: f"{named}: {error}"}
        for name, value in point.items():
            with suppress(ConfigError):
                row[name] = _typed(name, value)
        return row


def _seed(seed: int, number: int) -> int:
    return int.from_bytes(hashlib.sha256(f"scan {seed} {number}".encode()).digest()[:6])


def nothing(value: Any) -> bool:
    """Whether a value means "no value", in this program or in another: ``None``, NaN, ``NaT``,
    ``pandas.NA``, what numpy masks, no text, and the words of :data:`NOTHING`."""
    value = plain(value)
    if isinstance(value, str):
        return value.strip().lower() in NOTHING
    try:
        return value is None or bool(value != value)  # noqa: PLR0124  # as NaN
    except (TypeError, ArithmeticError):  # pandas.NA is neither equal to itself nor unequal
        return True


def failed(row: Mapping[str, Any]) -> bool:
    """Whether a row says in words why it has no result."""
    return isinstance(row.get(ERROR), str) and not nothing(row[ERROR])


def scan(
    points: Sequence[Point],
    *,
    blocks: int = 0,
    seed: int = 0,
    executor: Executor | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Row]:
    """The rows of these points, in their order.

    A point with impossible settings has a row without results, and a column :data:`ERROR` that says
    why; the others go on. ``executor`` computes them; ``None`` computes them here, one after the
    other. ``progress`` is called with the number of finished points. See :func:`evaluate` for the
    others. Raises ``ConfigError`` if all points are impossible.
    """
    tell = progress or (lambda _: None)
    jobs = [partial(_evaluated, one, blocks=blocks, seed=_seed(whole("seed", seed), n))
            for n, one in enumerate(records("points", points))]  # fmt: skip
    rows: list[Row] = []
    if executor is None:
        for job in jobs:
            rows.append(job())
            tell(len(rows))
    else:
        futures = [executor.submit(job) for job in jobs]
        try:
            for number, future in enumerate(as_completed(futures)):
                future.result()
                tell(number + 1)
        finally:
            for future in futures:
                future.cancel()
        rows = [future.result() for future in futures]
    if rows and all(ERROR in row for row in rows):
        raise ConfigError(rows[0][ERROR])
    return rows


# -- files


def _written(name: Any, value: Any) -> Any:
    """A value of a row, as files have it. Raises ``ConfigError``."""
    value = plain(value)
    if isinstance(value, list | tuple):
        value = json.dumps([plain(one) for one in value], default=str)
    if nothing(value) or (isinstance(value, float) and math.isinf(value)):
        return None  # JSON has no such number, and the other formats say the same
    if not isinstance(value, str | int | float | None):
        raise ConfigError(f"the column {name!r} has a {type(value).__name__}; use numbers or text")
    return _text(value) if isinstance(value, str) else value


def _text(text: str) -> str:
    """Escape characters that UTF-8 cannot encode, such as undecodable bytes of an argument."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", r"\x00")


def write_scan(path: Path | str, rows: Iterable[Row]) -> None:
    """Write rows to ``.csv``, ``.parquet`` or ``.json``. Raises ``ConfigError``, ``OSError``."""
    path = Path(path)
    kind = file_kind(path, "a scan", SUFFIXES)
    rows = [
        {_text(str(name)): _written(name, value) for name, value in row.items()}
        for row in records("rows", rows)
    ]
    names = list(dict.fromkeys(name for row in rows for name in row))
    if kind == ".json":
        content = (json.dumps(rows, indent=1) + "\n").encode()
    elif kind == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue().encode()
    else:
        import pyarrow.parquet  # noqa: PLC0415  # an extra

        made = io.BytesIO()
        table = pyarrow.table({n: _column(n, [row.get(n) for row in rows]) for n in names})
        pyarrow.parquet.write_table(table, made, write_page_checksum=True)
        content = made.getvalue()
    write_file(path, content, mode=PUBLIC)


def read_scan(path: Path | str) -> list[Row]:
    """The rows of a file that :func:`write_scan` made. Raises ``ConfigError``."""
    path = Path(path)
    kind = file_kind(path, "a scan", SUFFIXES)
    read = read_file if kind == ".parquet" else read_utf8
    content: Any = read(path, limit=MOST_BYTES, pipe=False)
    with parsing(path, "a scan", hint=f"; {_ROWS}" if kind == ".json" else ""):
        if kind == ".parquet":
            rows = _read_parquet(content)
        elif kind == ".csv":
            rows = _read_csv(content)
        else:
            _check_size(content.count("{"), 1)
            rows = load_json(content, most_values=MOST_VALUES)
        if not isinstance(rows, list) or not all(isinstance(one, dict) for one in rows):
            raise ConfigError(f"not a scan: {_ROWS}")
        return [{name: _checked(name, value) for name, value in row.items()} for row in rows]


def _checked(name: str, value: Any) -> Any:
    """A value of a file. Raises ``ConfigError`` for anything else in a column of numbers."""
    if nothing(value):
        return None
    value = plain(value)
    if TYPES.get(name) in ("float64", "int64") and type(value) not in (int, float):
        raise ConfigError(f"not a scan: {name} has {value!r}, and takes numbers: {_POINT}")
    return value


def _check_size(rows: int, columns: int) -> None:
    if rows > MOST_POINTS or rows * columns > MOST_VALUES:
        raise ConfigError(
            f"{rows:,} rows with {columns:,} values each: a scan has at most {MOST_POINTS:,} rows, "
            f"and {MOST_VALUES:,} values in all"
        )


def _check_names(names: Sequence[str]) -> None:
    if len(set(names)) != len(names):
        raise ValueError("two columns have the same name")


def _read_parquet(content: bytes) -> list[Row]:
    from pyarrow import parquet  # noqa: PLC0415  # an extra

    with parquet.ParquetFile(io.BytesIO(content), page_checksum_verification=True) as file:
        names = file.schema_arrow.names
        _check_names(names)
        groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
        _check_size(sum(one.num_rows for one in groups), len(names))
        rows: list[Row] = file.read().to_pylist()
    return rows


def _read_csv(text: str) -> list[Row]:
    """Raises ``ValueError`` and ``csv.Error``."""
    lines = io.StringIO(text, newline="")
    reader = csv.DictReader(lines, strict=True, skipinitialspace=True)
    names = reader.fieldnames or ()
    _check_names(names)
    _check_size(max(map(text.count, "\r\n")), len(names))
    if len(names) == 1 and re.search("[;\t|]", names[0]):
        raise ValueError(f"separate the columns by commas, and {_POINT}")
    rows = []
    for row in reader:
        if None in row:
            raise ValueError(f"a row has more values than there are columns; {_POINT}")
        if None in row.values():
            raise ValueError(
                f"line {reader.line_num} has fewer values than there are columns: "
                "the file may have been cut off"
            )
        rows.append({name: _number(name, value) for name, value in row.items()})
    return rows


def _number(name: str, text: str) -> Any:
    if nothing(text):
        return text
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if TYPES.get(name) == "int64" and _THOUSANDS.fullmatch(text):
        return text
    try:
        value = float(text)
    except ValueError:
        return text
    return int(value) if value.is_integer() and "e" not in text and "." not in text else value


def _column(name: str, values: list[Any]) -> Any:
    """A column of Parquet, which has one type: in all files that of :data:`TYPES`, whatever is
    empty, whole numbers or not; of other columns, that of their values. Values of several types
    become text."""
    import pyarrow  # noqa: PLC0415  # an extra

    for kind in (TYPES.get(name), None):
        with suppress(pyarrow.ArrowException, OverflowError):
            return pyarrow.array(values, kind)
    return pyarrow.array([None if one is None else str(one) for one in values])
