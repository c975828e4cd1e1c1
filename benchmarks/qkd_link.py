"""The cost of the QKD link's post-processing: ``python -m benchmarks.qkd_link [--end-to-end]``.

Without options: Cascade and Toeplitz hashing on one core, and packages from PyPI beside them in the
same run, if they are installed (they are not among our extras)::

    pip install qkdpy tno.quantum.communication.qkd_key_rate pyfftw mkl_fft

``--end-to-end``: from sifted bits to keys in a key store, each size in a process of its own with
its peak memory, then two processes at once.

Times are CPU times, so that other load on the machine matters little. Each figure is the median
over several keys, with the lowest and the highest in brackets. ``--docs`` writes the figures to
``docs/data/qkd-speed.json`` and the tables to ``docs/qkd-link-speed.md``.
"""

import argparse
import json
import math
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import trio
from numpy.typing import NDArray

from benchmarks.results import replaced, table
from hybridkex.link import asymptotic
from hybridkex.link.cascade import Cascade
from hybridkex.link.party import verification_hash
from hybridkex.link.presets import PRESETS
from hybridkex.link.statistics import binary_entropy
from hybridkex.link.toeplitz import compress, rounding_bound, seed_length
from hybridkex.qkd.sqlite_store import SqliteKeyStore
from hybridkex.secret import Secret

Bits = NDArray[np.uint8]

QBERS = (0.01, 0.02, 0.03, 0.04, 0.05)
BETWEEN = (0.005, 0.015, 0.024, 0.025, 0.035, 0.07, 0.11)
"""QBERs between and beside those of the table."""
BLOCK = 1_000_000
LARGE = 10_000_000
LARGE_ROUNDS = 5
BLOCK_ROUNDS = 40
"""Keys of 1e7 and 1e6 bits whose round trips are counted."""
PEER_BLOCK = 20_000
"""Bits of a key for other implementations of Cascade, whose speed does not depend on it."""
PEER_TOEPLITZ = 1_000
"""qkdpy writes the matrix out, so its time grows with the square."""
PLANNING_S = 5.0
"""Seconds that FFTW may spend on finding its best plan."""
INTENSITY = 0.48
LOSSES = (0.0, 2.5, 5.0, 7.5, 10.0)
PEERS = {
    "qkdpy": "qkdpy",
    "tno": "tno.quantum.communication",
    "pyfftw": "pyfftw",
    "mkl_fft": "mkl_fft",
}
"""Modules by the name in our results."""
HINT = "pip install qkdpy tno.quantum.communication.qkd_key_rate pyfftw mkl_fft"
SEED = 20_261_126
"""Of all keys here; no parameter of Cascade was chosen by means of them."""
END_TO_END = (10**4, 10**5, 10**6, 10**7, 10**8)
PARALLEL_BLOCKS = 16
KEY_BYTES = 32
DOCS = Path(__file__).parents[1] / "docs"
FIGURES = DOCS / "data/qkd-speed.json"
PAGE = DOCS / "qkd-link-speed.md"


def cpu(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.thread_time()
    result = call()
    return time.thread_time() - began, result


def noisy(length: int, rate: float, number: int) -> tuple[Bits, Bits]:
    """A key and one with errors; another pair for each length, rate and number."""
    draw = np.random.default_rng([SEED, length, round(rate * 1000), number])
    alice = draw.integers(0, 2, length, dtype=np.uint8)
    return alice, alice ^ (draw.random(length) < rate).astype(np.uint8)


def cascade(
    alice: Bits, bob: Bits, rate: float, *, compiled: bool | None = None
) -> tuple[int, int]:
    """Both sides in turns, as over a wire; bits disclosed and round trips. Corrects ``bob``."""
    method = Cascade(compiled)
    answers, search = method.respond(alice, rate), method.correct(bob, rate)
    requests = 0
    try:
        request = next(search)
        while True:
            requests += 1
            request = search.send(answers.answer(request))
    except StopIteration:
        return answers.disclosed, requests


def qkdpy_cascade(alice: Bits, bob: Bits) -> tuple[float, int]:
    """Return the seconds and the remaining wrong bits; it does not report what it disclosed."""
    from qkdpy.key_management.error_correction import ErrorCorrection  # noqa: PLC0415

    ours, theirs = alice.tolist(), bob.tolist()
    seconds, (left, right) = cpu(lambda: ErrorCorrection.cascade(ours, theirs))
    return seconds, sum(a != b for a, b in zip(left, right, strict=True))


def tno_cascade(alice: Bits, bob: Bits, rate: float) -> tuple[float, int, int]:
    """Return seconds, remaining wrong bits and disclosed bits; set up as in its documentation."""
    from tno.quantum.communication.qkd_key_rate.classical import (  # noqa: PLC0415
        Message,
        ParityStrategy,
        Permutations,
    )
    from tno.quantum.communication.qkd_key_rate.classical.cascade import (  # noqa: PLC0415
        CascadeCorrector,
        CascadeReceiver,
        CascadeSender,
    )

    order = Permutations.random_permutation(
        number_of_passes=8, message_size=len(alice), random_state=42
    )
    strategy = ParityStrategy(error_rate=rate, sampling_fraction=0.34, number_of_passes=8)
    sender = CascadeSender(message=Message(alice.tolist()), permutations=order)
    receiver = CascadeReceiver(
        message=Message(bob.tolist()), permutations=order, parity_strategy=strategy
    )
    corrector = CascadeCorrector(alice=sender, bob=receiver)
    seconds, summary = cpu(corrector.correct_errors)
    return seconds, round(summary.output_error * len(alice)), summary.number_of_exposed_bits


def of_cascade(rate: float, rounds: int, peers: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"qber": rate, "keys": rounds, "large_keys": LARGE_ROUNDS}
    ours = [one_cascade(BLOCK, rate, number) for number in range(rounds)]
    plain = [one_cascade(BLOCK, rate, number, compiled=False) for number in range(rounds)]
    large = [one_cascade(LARGE, rate, number) for number in range(LARGE_ROUNDS)]
    found["mbit_s"] = spread([speed for speed, _, _ in ours])
    found["numpy_mbit_s"] = spread([speed for speed, _, _ in plain])
    found["f"] = spread([f for _, f, _ in ours])
    found["round_trips"] = max(trips for _, _, trips in ours)
    found["large_f"] = spread([f for _, f, _ in large])
    found["large_round_trips"] = max(trips for _, _, trips in large)
    alice, bob = noisy(PEER_BLOCK, rate, 0)
    shannon = PEER_BLOCK * binary_entropy(float((alice != bob).mean()))
    if "qkdpy" in peers:
        seconds, left = qkdpy_cascade(alice, bob)
        found |= {"qkdpy_mbit_s": PEER_BLOCK / seconds / 1e6, "qkdpy_wrong_bits_left": left}
    if "tno" in peers:
        seconds, left, told = tno_cascade(alice, bob, rate)
        found |= {"tno_mbit_s": PEER_BLOCK / seconds / 1e6, "tno_wrong_bits_left": left}
        found["tno_f"] = told / shannon
    return found


def one_cascade(
    length: int, rate: float, number: int, *, compiled: bool | None = None
) -> tuple[float, float, int]:
    """Measure Mbit/s, f and round trips of one key."""
    alice, bob = noisy(length, rate, number)
    errors = int((alice != bob).sum())
    seconds, (disclosed, trips) = cpu(lambda: cascade(alice, bob, rate, compiled=compiled))
    if (alice != bob).any():
        raise RuntimeError("Cascade left a wrong bit")
    return length / seconds / 1e6, disclosed / (length * binary_entropy(errors / length)), trips


def of_ldpc(rounds: int) -> dict[str, float]:
    """Measure one iteration of sum-product in numpy, as a decoder of the other kind needs it.

    A regular code of a block, three checks for each bit, for a QBER of 5 % at f = 1.1. Decoders
    near such an f take tens of iterations, and irregular codes, which they need, more edges.
    """
    degree = round(3 / (1.1 * binary_entropy(0.05)))
    draw = np.random.default_rng(1)
    edges = 3 * BLOCK // degree * degree
    order = draw.permutation(edges)
    back = np.argsort(order)
    of_bit = draw.normal(3.0, 1.0, edges // 3).astype(np.float32)
    to_check = np.repeat(of_bit, 3)

    def iterate() -> NDArray[np.float32]:
        inner = np.tanh(to_check[order].reshape(-1, degree) / 2)
        others = np.clip(inner.prod(axis=1, keepdims=True) / inner, -0.999999, 0.999999)
        to_bit = 2 * np.arctanh(others).reshape(-1)[back].reshape(-1, 3)
        total: NDArray[np.float32] = of_bit + to_bit.sum(axis=1)
        return (total[:, None] - to_bit).reshape(-1)

    return {"edges": edges, "ms": statistics.median(cpu(iterate)[0] for _ in range(rounds)) * 1000}


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def fftw_product(length: int, rounds: int) -> float:
    """Mbit/s of a cyclic product of that many real numbers by pyfftw, without packing bits."""
    import pyfftw  # noqa: PLC0415

    size = pyfftw.next_fast_len(length)
    real = [pyfftw.zeros_aligned(size, dtype="float64") for _ in range(2)]
    spectra = [pyfftw.zeros_aligned(size // 2 + 1, dtype="complex128") for _ in range(2)]
    options = {"flags": ("FFTW_MEASURE",), "planning_timelimit": PLANNING_S}
    forward = [pyfftw.FFTW(a, b, **options) for a, b in zip(real, spectra, strict=True)]
    back = pyfftw.FFTW(spectra[0], real[0], direction="FFTW_BACKWARD", **options)

    def product() -> None:
        for one in forward:
            one()
        spectra[0] *= spectra[1]
        back()

    return length / statistics.median(cpu(product)[0] for _ in range(rounds)) / 1e6


def mkl_product(length: int, rounds: int) -> float:
    """Measure the same with mkl_fft."""
    from mkl_fft.interfaces import numpy_fft  # noqa: PLC0415
    from scipy import fft  # noqa: PLC0415

    size = fft.next_fast_len(length, real=True)
    real = [np.zeros(size) for _ in range(2)]

    def product() -> None:
        left, right = (numpy_fft.rfft(one) for one in real)
        left *= right
        numpy_fft.irfft(left, size)

    return length / statistics.median(cpu(product)[0] for _ in range(rounds)) / 1e6


def of_toeplitz(length: int, rounds: int, peers: set[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"input_bits": length, "keys": rounds}
    speeds: dict[bool | None, list[float]] = {None: [], False: []}
    for number in range(-1, rounds):  # the first makes the tables, which are kept
        key, _ = noisy(length, 0.0, number + 1)
        seed, _ = noisy(seed_length(length), 0.0, number + 1)
        for compiled, several in speeds.items():
            seconds, _ = cpu(lambda: compress(key, seed, length // 4, compiled=compiled))  # noqa: B023
            if number >= 0:
                several.append(length / seconds / 1e6)
    found |= {"mbit_s": spread(speeds[None]), "numpy_mbit_s": spread(speeds[False])}
    found["rounding_bound"] = rounding_bound(length)
    if "pyfftw" in peers:
        found["pyfftw_mbit_s"] = fftw_product(length, rounds)
    if "mkl_fft" in peers:
        found["mkl_fft_mbit_s"] = mkl_product(length, rounds)
    if "qkdpy" in peers:
        from qkdpy.key_management.privacy_amplification import (  # noqa: PLC0415
            PrivacyAmplification,
        )

        short = key[:PEER_TOEPLITZ].tolist()
        seconds, _ = cpu(
            lambda: PrivacyAmplification.toeplitz_hashing(short, PEER_TOEPLITZ // 4, seed=1)
        )
        found["qkdpy_mbit_s"] = PEER_TOEPLITZ / seconds / 1e6
    return found


async def store_keys(path: Path, output: bytes) -> int:
    """Cut a secret into keys and store them, as a KME does."""
    store = SqliteKeyStore(path, Secret(bytes(32)))
    whole = len(output) // KEY_BYTES
    keys = [
        (f"{number:032x}", Secret(output[number * KEY_BYTES : (number + 1) * KEY_BYTES]))
        for number in range(whole)
    ]
    await store.add("link", keys)
    await store.aclose()
    return whole


def whole_block(length: int, number: int) -> dict[str, float]:
    """Run both parties here, from sifted bits to keys in two stores (a quarter of the bits)."""
    alice, bob = noisy(length, 0.02, number)
    draw = np.random.default_rng([SEED, number])
    matrix = draw.integers(0, 2, seed_length(length), dtype=np.uint8)
    hash_seed = draw.bytes(32)
    with tempfile.TemporaryDirectory() as folder:
        began, wall_began = time.process_time(), time.perf_counter()
        cascade(alice, bob, 0.02)
        if (verification_hash(alice, hash_seed, 50) != verification_hash(bob, hash_seed, 50)).any():
            raise RuntimeError("the keys differ")
        outputs = []
        for name, key in (("alice", alice), ("bob", bob)):
            outputs.append(np.packbits(compress(key, matrix, length // 4)).tobytes())
            keys = trio.run(store_keys, Path(folder) / name, outputs[-1])
        seconds, wall = time.process_time() - began, time.perf_counter() - wall_began
    if outputs[0] != outputs[1]:
        raise RuntimeError("the secret keys differ")
    return {
        "input_bits": length,
        "cpu_s": seconds,
        "wall_s": wall,
        "mbit_s": length / seconds / 1e6,
        "keys": keys,
        "peak_mib": peak_mib(),
    }


def peak_mib() -> float:
    """Return the peak memory of this process alone; ``ru_maxrss`` would include its parent's."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise RuntimeError("/proc/self/status has no peak of memory")
    return int(found[1]) / 1024


def warmed_block(length: int, number: int) -> dict[str, float]:
    """Measure a block after a small one, which loads the compiled code."""
    whole_block(10_000, 1000)
    return whole_block(length, number)


def new_processes(count: int) -> ProcessPoolExecutor:
    """Processes that have held nothing yet: a peak of memory is that of a process's whole life."""
    return ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn"))


def of_whole_blocks() -> dict[str, Any]:
    alone = []
    for length in END_TO_END:
        with new_processes(1) as pool:
            alone.append(pool.submit(warmed_block, length, 0).result())
        print(f"{length:,} sifted bits: {alone[-1]['cpu_s']:.2f} s", flush=True)
    parallel = {}
    for cores in (1, 2):
        with new_processes(cores) as pool:
            # Each process makes the orders of Cascade's passes once, and keeps them.
            list(pool.map(warmed_block, [BLOCK] * 2 * cores, range(100, 100 + 2 * cores)))
            began = time.perf_counter()
            done = list(pool.map(whole_block, [BLOCK] * PARALLEL_BLOCKS, range(PARALLEL_BLOCKS)))
            wall = time.perf_counter() - began
        parallel[str(cores)] = {
            "blocks": PARALLEL_BLOCKS,
            "wall_mbit_s": PARALLEL_BLOCKS * BLOCK / wall / 1e6,
            "cpu_mbit_s": BLOCK / statistics.median(one["cpu_s"] for one in done) / 1e6,
            "keys": sum(one["keys"] for one in done),
            "peak_mib": max(one["peak_mib"] for one in done),
        }
    return {"alone": alone, "parallel": parallel}


def of_key_rates(name: str) -> list[dict[str, float]]:
    """Compare asymptotic rates of TNO's package and ours. Its q and f are 1."""
    from tno.quantum.communication.qkd_key_rate.quantum import standard_detector  # noqa: PLC0415
    from tno.quantum.communication.qkd_key_rate.quantum.bb84 import (  # noqa: PLC0415
        BB84FullyAsymptoticKeyRateEstimate,
    )

    channel = PRESETS[name].channel
    detector = standard_detector.customise(
        dark_count_rate=channel.background / 2,
        polarization_drift=math.asin(math.sqrt(channel.misalignment)),
        efficiency_party=channel.receiver_efficiency,
    )
    theirs = BB84FullyAsymptoticKeyRateEstimate(detector=detector)
    lines = []
    for loss in LOSSES:
        there = channel.at(loss / channel.attenuation_db_per_km)
        times: dict[str, list[float]] = {"tno": [], "ours": []}
        for _ in range(5):
            seconds, rate = cpu(lambda: theirs.compute_rate(INTENSITY, loss))  # noqa: B023
            times["tno"].append(seconds)
            seconds, ours = cpu(
                lambda: 2 * asymptotic.infinite_decoy_rate(there, INTENSITY, f=1.0)  # noqa: B023
            )
            times["ours"].append(seconds)
        lines.append(
            {
                "loss_db": loss,
                "tno": float(rate),
                "ours": ours,
                "difference": ours / float(rate) - 1,
                "tno_us": statistics.median(times["tno"]) * 1e6,
                "ours_us": statistics.median(times["ours"]) * 1e6,
            }
        )
    return lines


def triple(values: tuple[float, float, float], digits: int) -> str:
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low} to {high})"


def cascade_table(lines: list[dict[str, Any]]) -> str:
    return table(
        "QBER",
        "with numba, Mbit/s",
        "numpy alone",
        "f, median (range)",
        "round trips, most",
        "f at 1e7 bits",
        "round trips, most",
        rows=[
            (
                f"{line['qber']:.0%}",
                triple(line["mbit_s"], 0),
                triple(line["numpy_mbit_s"], 0),
                triple(line["f"], 3),
                str(line["round_trips"]),
                triple(line["large_f"], 3),
                str(line["large_round_trips"]),
            )
            for line in lines
        ],
    )


def peers_table(lines: list[dict[str, Any]]) -> str:
    return table(
        "QBER",
        "hybridkex, Mbit/s",
        "qkdpy",
        "wrong bits left",
        "TNO",
        "wrong bits left",
        "f of TNO",
        rows=[
            (
                f"{line['qber']:.0%}",
                f"{line['mbit_s'][0]:.0f}",
                f"{line['qkdpy_mbit_s']:.2f}",
                str(line["qkdpy_wrong_bits_left"]),
                f"{line['tno_mbit_s']:.2f}",
                str(line["tno_wrong_bits_left"]),
                f"{line['tno_f']:.2f}",
            )
            for line in lines
            if "tno_f" in line and "qkdpy_mbit_s" in line
        ],
    )


def toeplitz_table(lines: list[dict[str, Any]]) -> str:
    return table(
        "input bits",
        "with numba, Mbit/s",
        "numpy alone",
        "pyfftw, transforms alone",
        "mkl_fft, transforms alone",
        "qkdpy",
        rows=[
            (
                f"{line['input_bits']:.0e}".replace("e+0", "e"),
                triple(line["mbit_s"], 1),
                triple(line["numpy_mbit_s"], 1),
                f"{line['pyfftw_mbit_s']:.1f}" if "pyfftw_mbit_s" in line else "–",
                f"{line['mkl_fft_mbit_s']:.1f}" if "mkl_fft_mbit_s" in line else "–",
                f"{line['qkdpy_mbit_s']:.4f}" if "qkdpy_mbit_s" in line else "–",
            )
            for line in lines
        ],
    )


def blocks_table(found: dict[str, Any]) -> str:
    return table(
        "sifted bits",
        "processes",
        "CPU time of a block, s",
        "Mbit/s of CPU time",
        "Mbit/s by the clock",
        "keys stored by each party",
        "peak memory of a process, MiB",
        rows=[
            (
                f"{line['input_bits']:.0e}".replace("e+0", "e"),
                "1",
                f"{line['cpu_s']:.3g}",
                f"{line['mbit_s']:.1f}",
                f"{line['input_bits'] / line['wall_s'] / 1e6:.2g}",
                f"{line['keys']:,}",
                f"{line['peak_mib']:,.0f}",
            )
            for line in found["alone"]
        ]
        + [
            (
                f"{line['blocks']} × 1e6",
                cores,
                f"{1 / line['cpu_mbit_s']:.3g}",
                f"{line['cpu_mbit_s']:.1f}",
                f"{line['wall_mbit_s']:.1f}",
                f"{line['keys']:,}",
                f"{line['peak_mib']:,.0f}",
            )
            for cores, line in found["parallel"].items()
        ],
    )


TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "cascade": ("cascade", cascade_table),
    "peers": ("cascade", peers_table),
    "toeplitz": ("toeplitz", toeplitz_table),
    "end-to-end": ("whole_blocks", blocks_table),
}
"""The tables of the documentation, and the measurement that each shows."""


def with_tables(page: str, found: dict[str, Any]) -> str:
    """Return the page with its tables replaced by those of these figures."""
    return replaced(page, {name: make(found[key]) for name, (key, make) in TABLES.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="keys for each figure")
    parser.add_argument("--end-to-end", action="store_true", help="1e4 to 1e8 bits; takes 3 GiB")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--docs", action="store_true", help="write figures and tables into docs/")
    parser.add_argument("--round-trips", action="store_true", help="of 1e6 and 1e7 bits; no tables")
    args = parser.parse_args()
    if args.round_trips:
        for rate in sorted(QBERS + BETWEEN):
            for length, keys in ((BLOCK, BLOCK_ROUNDS), (LARGE, LARGE_ROUNDS)):
                trips = [one_cascade(length, rate, number)[2] for number in range(keys)]
                print(f"{rate:.1%}, {length:.0e} bits: {min(trips)} to {max(trips)} round trips")
        return
    found = {"whole_blocks": of_whole_blocks()} if args.end_to_end else steps(args.rounds)
    if args.docs:
        before = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        FIGURES.write_text(json.dumps(before | found, indent=1) + "\n")
        if all(key in before | found for key, _ in TABLES.values()):
            PAGE.write_text(with_tables(PAGE.read_text(), before | found))
    elif args.json:
        print(json.dumps(found))
    else:
        show(found)


def steps(rounds: int) -> dict[str, Any]:
    """Measure each step on one core, ours and those of the installed peers."""
    peers = {
        name
        for name, module in PEERS.items()
        if find_spec(module.partition(".")[0]) and find_spec(module)
    }
    if len(peers) < len(PEERS):
        print(f"Not all peers are installed: {HINT}")
    for length in (BLOCK, LARGE):
        for rate in QBERS:  # the orders of the passes are made once, and kept
            cascade(*noisy(length, rate, 1000), rate)
    found: dict[str, Any] = {
        "cascade": [of_cascade(rate, rounds, peers) for rate in QBERS],
        "ldpc_iteration": of_ldpc(rounds),
        "toeplitz": [of_toeplitz(length, rounds, peers) for length in (BLOCK, LARGE)],
    }
    if "tno" in peers:
        found["key_rate"] = {name: of_key_rates(name) for name in ("gys2005", "rusca2018")}
    return found


def show(found: dict[str, Any]) -> None:
    for name, (key, make) in TABLES.items():
        if key in found:
            print(f"{name}\n{make(found[key])}\n")
    if "ldpc_iteration" in found:
        ldpc = found["ldpc_iteration"]
        print(
            f"One iteration of an LDPC decoder in numpy, {ldpc['edges']:,} edges: "
            f"{ldpc['ms']:.0f} ms, so with 30 of them {BLOCK / ldpc['ms'] / 30 / 1e3:.2f} Mbit/s"
        )
    for name, lines in found.get("key_rate", {}).items():
        print(
            f"Asymptotic key rate, {name}, bits per pulse (q = f = 1): loss, TNO, ours, difference"
        )
        for line in lines:
            print(
                f"  {line['loss_db']:4.1f} dB  {line['tno']:.6e}  {line['ours']:.6e}  "
                f"{line['difference']:+.3%}  ({line['tno_us']:.0f} and {line['ours_us']:.1f} us)"
            )


if __name__ == "__main__":
    main()
