"""Makes the JSON files here: ``python select_vectors.py path/to/acvptool/test``.

The argument is the folder ``util/fipstools/acvp/acvptool/test`` of BoringSSL, with ``vectors`` and
``expected``. Each row is: number of the case, parameter set, values in hexadecimal or a verdict.
"""

import bz2
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
Case = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]


def cases(folder: Path, name: str) -> Iterator[Case]:
    """Group, case and expected answer of every case, of files that the argument names."""
    given, expected = (
        json.loads(bz2.decompress((folder / which / f"{name}.bz2").read_bytes()))
        for which in ("vectors", "expected")
    )
    answers = {
        (part["vsId"], case["tcId"]): case
        for part in expected
        for group in part.get("testGroups", ())
        for case in group["tests"]
    }
    for part in given:
        for group in part.get("testGroups", ()):
            for case in group["tests"]:
                yield {**part, **group}, case, answers[part["vsId"], case["tcId"]]


def ml_kem(folder: Path) -> dict[str, list[list[Any]]]:
    found: dict[str, list[list[Any]]] = {
        "key_pair": [],
        "open_with_seed": [],
        "open": [],
        "check": [],
    }
    for name in ("ML-KEM", "ML-KEM-seed", "ML-KEM-encap-key-check"):
        for group, case, answer in cases(folder, name):
            head = [case["tcId"], group["parameterSet"]]
            seed = (case.get("d", "") + case.get("z", "")).lower()
            match group.get("function", group["mode"]), group.get("keyFormat"):
                case "keyGen", _:
                    row = [seed, answer["ek"].lower(), answer["dk"].lower()]
                    found["key_pair"].append(head + row)
                case "decapsulation", "seed":
                    row = [seed, case["c"].lower(), answer["k"].lower()]
                    found["open_with_seed"].append(head + row)
                case "decapsulation", _:
                    row = [case["dk"].lower(), case["c"].lower(), answer["k"].lower()]
                    found["open"].append(head + row)
                case "encapsulationKeyCheck", _:
                    found["check"].append([*head, case["ek"].lower(), answer["testPassed"]])
    return found


def ml_dsa(folder: Path) -> dict[str, list[list[Any]]]:
    found: dict[str, list[list[Any]]] = {"key_pair": [], "verify": [], "signed_with_seed": []}
    for name in ("ML-DSA", "ML-DSA-seed"):
        for group, case, answer in cases(folder, name):
            head = [case["tcId"], group["parameterSet"]]
            match group["mode"], group.get("keyFormat"):
                case "keyGen", _:
                    found["key_pair"].append([*head, case["seed"].lower(), answer["pk"].lower()])
                case "sigVer", _:
                    kind = "mu" if group["externalMu"] else "message"
                    row = [case["pk"], kind, case[kind], case["signature"]]
                    row = [str(value).lower() for value in row] + [answer["testPassed"]]
                    found["verify"].append(head + row)
                case "sigGen", "seed":
                    row = [case["seed"], case["mu"], answer["signature"]]
                    found["signed_with_seed"].append(head + [str(value).lower() for value in row])
    return found


def tls13_kdf(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Inputs and secrets of each case, by ACVP's own names (draft-hammett-acvp-kdf-tls-v1.3)."""
    found = []
    for group, case, answer in cases(folder, "TLS13"):
        row = {"hash": group["hmacAlg"], "mode": group["runningMode"]}
        values = {**case, **answer}
        number = values.pop("tcId")
        row |= {name: str(value).lower() for name, value in values.items()}
        found.append({"number": number, **row})
    return {"cases": found}


def main(folder: Path) -> None:
    tables = {"ml_kem": ml_kem(folder), "ml_dsa": ml_dsa(folder), "tls13_kdf": tls13_kdf(folder)}
    for name, table in tables.items():
        (HERE / f"{name}.json").write_text(json.dumps(table, indent=0) + "\n", encoding="ascii")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
