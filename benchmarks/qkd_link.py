"""What the QKD link's post-processing takes: ``python benchmarks/qkd_link.py [--json]``.

Cascade and Toeplitz hashing on one core, and beside them in the same run, by turns, packages of
PyPI, if they are there (they are not among our extras)::

    pip install qkdpy tno.quantum.communication.qkd_key_rate pyfftw

Times are the CPU time of the one thread that works, so that it counts little what else the machine
does. What is shown is the median over the rounds and, in brackets, the spread. ``--end-to-end``
adds whole keys from sifted bits, each size in a process of its own, with its peak of memory.
"""

import argparse
import json
import math
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybridkex.link import asymptotic
from hybridkex.link.cascade import Cascade
from hybridkex.link.entropy import binary_entropy
from hybridkex.link.party import verification_hash
from hybridkex.link.presets import PRESETS
from hybridkex.link.toeplitz import compress, rounding_bound, seed_length

Bits = NDArray[np.uint8]

QBERS = (0.01, 0.02, 0.03, 0.04, 0.05)
BLOCK = 1_000_000
PEER_BLOCK = 100_000
"""The peers' Cascade is too slow for more; their speed hardly depends on it."""
PEER_TOEPLITZ = 2_000
"""qkdpy writes the matrix out, so its time grows with the square."""
INTENSITY = 0.48
LOSSES = (0.0, 2.5, 5.0, 7.5, 10.0)
HINT = "pip install qkdpy tno.quantum.communication.qkd_key_rate pyfftw"
END_TO_END = (10**4, 10**5, 10**6, 10**7, 10**8)
PARALLEL_BLOCKS = 16


def cpu(call: Callable[[], Any]) -> tuple[float, Any]:
    began = time.thread_time()
    result = call()
    return time.thread_time() - began, result


def noisy(length: int, rate: float, seed: int) -> tuple[Bits, Bits]:
    draw = np.random.default_rng(seed)
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
    """Seconds, and wrong bits that are left. It does not say what it disclosed."""
    from qkdpy.key_management.error_correction import ErrorCorrection  # noqa: PLC0415

    ours, theirs = alice.tolist(), bob.tolist()
    seconds, (left, right) = cpu(lambda: ErrorCorrection.cascade(ours, theirs))
    return seconds, sum(a != b for a, b in zip(left, right, strict=True))


def tno_cascade(alice: Bits, bob: Bits, rate: float) -> tuple[float, int, int]:
    """Seconds, wrong bits that are left, bits disclosed; set up as its documentation does."""
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
    ours: list[float] = []
    plain: list[float] = []
    fs: list[float] = []
    others: dict[str, list[float]] = {name: [] for name in sorted(peers)}
    found: dict[str, Any] = {"qber": rate}
    for number in range(rounds):
        alice, bob = noisy(BLOCK, rate, number)
        errors = int((alice != bob).sum())
        other = bob.copy()
        seconds, _ = cpu(lambda: cascade(alice, other, rate, compiled=False))  # noqa: B023
        plain.append(BLOCK / seconds / 1e6)
        seconds, (disclosed, questions) = cpu(lambda: cascade(alice, bob, rate))  # noqa: B023
        if (alice != bob).any():
            raise RuntimeError("Cascade left a wrong bit")
        ours.append(BLOCK / seconds / 1e6)
        fs.append(disclosed / (BLOCK * binary_entropy(errors / BLOCK)))
        found["questions"] = questions
        if number:
            continue  # the peers take seconds, once is enough
        alice, bob = noisy(PEER_BLOCK, rate, number)
        shannon = PEER_BLOCK * binary_entropy(float((alice != bob).mean()))
        if "qkdpy" in peers:
            seconds, left = qkdpy_cascade(alice, bob)
            others["qkdpy"].append(PEER_BLOCK / seconds / 1e6)
            found["qkdpy_wrong_bits_left"] = left
        if "tno" in peers:
            seconds, left, told = tno_cascade(alice, bob, rate)
            others["tno"].append(PEER_BLOCK / seconds / 1e6)
            found |= {"tno_wrong_bits_left": left, "tno_f": told / shannon}
    found |= {"mbit_s": spread(ours), "numpy_mbit_s": spread(plain), "f": spread(fs)}
    for name, speeds in others.items():
        found[f"{name}_mbit_s"] = speeds[0]
        found[f"times_{name}"] = statistics.median(ours) / speeds[0]
    return found


def of_ldpc(rounds: int) -> dict[str, float]:
    """What a decoder of the other kind would take: one iteration of sum-product, in numpy.

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
    forward = [
        pyfftw.FFTW(a, b, flags=("FFTW_MEASURE",)) for a, b in zip(real, spectra, strict=True)
    ]
    back = pyfftw.FFTW(spectra[0], real[0], direction="FFTW_BACKWARD", flags=("FFTW_MEASURE",))

    def product() -> None:
        for one in forward:
            one()
        spectra[0] *= spectra[1]
        back()

    return length / statistics.median(cpu(product)[0] for _ in range(rounds)) / 1e6


def whole_block(length: int, seed: int) -> dict[str, float]:
    """Error correction, verification and hashing to a quarter, both parties, in this process."""
    small, other = noisy(10_000, 0.02, seed)
    cascade(small, other, 0.02)  # compiled code is loaded once
    alice, bob = noisy(length, 0.02, seed)
    draw = np.random.default_rng(seed)
    matrix = draw.integers(0, 2, seed_length(length), dtype=np.uint8)
    hash_seed = draw.bytes(32)

    def work() -> int:
        cascade(alice, bob, 0.02)
        if (verification_hash(alice, hash_seed, 50) != verification_hash(bob, hash_seed, 50)).any():
            raise RuntimeError("the keys differ")
        ours, theirs = (compress(key, matrix, length // 4) for key in (alice, bob))
        if (ours != theirs).any():
            raise RuntimeError("the secret keys differ")
        return length // 4 // 256

    work_began = time.perf_counter()
    seconds, keys = cpu(work)
    return {
        "input_bits": length,
        "cpu_s": seconds,
        "wall_s": time.perf_counter() - work_began,
        "mbit_s": length / seconds / 1e6,
        "keys": keys,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def of_whole_blocks() -> dict[str, Any]:
    spawn = multiprocessing.get_context("spawn")
    alone = []
    for length in END_TO_END:
        with ProcessPoolExecutor(1, mp_context=spawn) as pool:
            alone.append(pool.submit(whole_block, length, 1).result())
    with ProcessPoolExecutor(2, mp_context=spawn) as pool:
        list(pool.map(whole_block, [10_000] * 4, range(4)))
        began = time.perf_counter()
        done = list(pool.map(whole_block, [BLOCK] * PARALLEL_BLOCKS, range(PARALLEL_BLOCKS)))
        wall = time.perf_counter() - began
    two = {
        "blocks": PARALLEL_BLOCKS,
        "wall_mbit_s": PARALLEL_BLOCKS * BLOCK / wall / 1e6,
        "cpu_mbit_s": 2 * BLOCK / statistics.median(one["cpu_s"] for one in done) / 1e6,
        "keys": sum(one["keys"] for one in done),
    }
    return {"alone": alone, "two_cores": two}


def of_toeplitz(length: int, rounds: int, peers: set[str]) -> dict[str, Any]:
    speeds = []
    for number in range(rounds):
        draw = np.random.default_rng(number)
        key = draw.integers(0, 2, length, dtype=np.uint8)
        seed = draw.integers(0, 2, seed_length(length), dtype=np.uint8)
        seconds, _ = cpu(lambda: compress(key, seed, length // 4))  # noqa: B023
        speeds.append(length / seconds / 1e6)
    found: dict[str, Any] = {"input_bits": length, "mbit_s": spread(speeds)}
    found["rounding_bound"] = rounding_bound(length)
    if "pyfftw" in peers:
        found["pyfftw_mbit_s"] = fftw_product(length, rounds)
    if "qkdpy" in peers:
        from qkdpy.key_management.privacy_amplification import (  # noqa: PLC0415
            PrivacyAmplification,
        )

        short = key[:PEER_TOEPLITZ].tolist()
        seconds, _ = cpu(
            lambda: PrivacyAmplification.toeplitz_hashing(short, PEER_TOEPLITZ // 4, seed=1)
        )
        found["qkdpy_mbit_s"] = PEER_TOEPLITZ / seconds / 1e6
        found["times_qkdpy"] = found["mbit_s"][0] / found["qkdpy_mbit_s"]
    return found


def of_key_rates(name: str) -> list[dict[str, float]]:
    """Asymptotic rates of TNO's package and ours. Its q and f are 1."""
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
        for _ in range(50):
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--end-to-end", action="store_true", help="1e4 to 1e8 bits, 3 GiB")
    args = parser.parse_args()
    peers = {
        name
        for name, module in (
            ("qkdpy", "qkdpy"),
            ("tno", "tno.quantum.communication"),
            ("pyfftw", "pyfftw"),
        )
        if find_spec(module.partition(".")[0]) and find_spec(module)
    }
    cascade(*noisy(BLOCK, 0.05, 0), 0.05)  # the orders of the passes are made once, and kept
    found: dict[str, Any] = {
        "cascade": [of_cascade(rate, args.rounds, peers - {"pyfftw"}) for rate in QBERS],
        "ldpc_iteration": of_ldpc(args.rounds),
        "toeplitz": [of_toeplitz(length, args.rounds, peers) for length in (10**6, 10**7)],
    }
    if "tno" in peers:
        found["key_rate"] = {name: of_key_rates(name) for name in ("gys2005", "rusca2018")}
    if args.end_to_end:
        found["whole_blocks"] = of_whole_blocks()
    if args.json:
        print(json.dumps(found))
        return
    print(f"Cascade, blocks of {BLOCK:,} bits, both sides; Mbit of sifted key per CPU second")
    for line in found["cascade"]:
        print(
            f"  QBER {line['qber']:.0%}: {triple(line['mbit_s'], 1)}, "
            f"numpy {triple(line['numpy_mbit_s'], 1)}, f {triple(line['f'], 3)}, "
            f"{line['questions']} round trips"
        )
        for name in sorted(peers - {"pyfftw"}):
            more = f", f {line['tno_f']:.2f}" if name == "tno" else ""
            print(
                f"    {name}, {PEER_BLOCK:,} bits: {line[f'{name}_mbit_s']:.3f}{more}, "
                f"{line[f'{name}_wrong_bits_left']} wrong bits left; "
                f"ours is {line[f'times_{name}']:.0f} times as fast"
            )
    ldpc = found["ldpc_iteration"]
    print(
        f"One iteration of an LDPC decoder in numpy, {ldpc['edges']:,} edges: {ldpc['ms']:.0f} ms, "
        f"so with 30 of them {BLOCK / ldpc['ms'] / 30 / 1e3:.2f} Mbit/s"
    )
    print("Toeplitz hashing to a quarter; Mbit of input per CPU second")
    for line in found["toeplitz"]:
        print(
            f"  {line['input_bits']:,} bits: {triple(line['mbit_s'], 1)}; "
            f"no coefficient is wrong by more than {line['rounding_bound']:.1e}"
        )
        if "pyfftw" in peers:
            print(f"    pyfftw, the three transforms alone: {line['pyfftw_mbit_s']:.1f}")
        if "qkdpy" in peers:
            print(
                f"    qkdpy, {PEER_TOEPLITZ:,} bits: {line['qkdpy_mbit_s']:.5f}; "
                f"ours is {line['times_qkdpy']:,.0f} times as fast"
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
    for line in found.get("whole_blocks", {}).get("alone", ()):
        print(
            f"{line['input_bits']:,} sifted bits to {line['keys']:,} keys of 256 bits: "
            f"{line['mbit_s']:.1f} Mbit/s, peak {line['peak_mib']:.0f} MiB"
        )
    if "whole_blocks" in found:
        two = found["whole_blocks"]["two_cores"]
        print(
            f"Two processes, {two['blocks']} blocks of {BLOCK:,} bits: {two['wall_mbit_s']:.1f} "
            f"Mbit/s by the clock, {two['cpu_mbit_s']:.1f} by CPU time"
        )
    if len(peers) < 3:
        print(f"Not everything to compare with is here: {HINT}")


if __name__ == "__main__":
    main()
