"""Take from Wycheproof what this library composes: ``python select_vectors.py testvectors_v1``.

Groups that we do not use (other nonce, tag and key sizes) are left out, and of long runs of similar
cases the first few are kept, so that the files stay small. Nothing inside a case is changed.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

# file: columns, and how many cases to keep of those with the same result and flags.
WANTED: dict[str, tuple[tuple[str, ...], int]] = {
    "x25519": (("private", "public", "shared"), 1000),
    "ecdh_secp256r1_ecpoint": (("private", "public", "shared"), 60),
    "ecdh_secp384r1_ecpoint": (("private", "public", "shared"), 60),
    "mlkem_768": (("seed", "c", "K"), 16),
    "mlkem_1024": (("seed", "c", "K"), 16),
    "mlkem_768_encaps": (("ek",), 16),
    "mlkem_1024_encaps": (("ek",), 16),
    "mldsa_44_verify": (("publicKey", "msg", "sig"), 1),
    "mldsa_65_verify": (("publicKey", "msg", "sig"), 1),
    "mldsa_87_verify": (("publicKey", "msg", "sig"), 1),
    "mldsa_44_sign_seed": (("privateSeed", "msg", "publicKey"), 2),
    "mldsa_65_sign_seed": (("privateSeed", "msg", "publicKey"), 2),
    "mldsa_87_sign_seed": (("privateSeed", "msg", "publicKey"), 2),
    "aes_gcm": (("key", "iv", "aad", "msg", "ct", "tag"), 1000),
    "chacha20_poly1305": (("key", "iv", "aad", "msg", "ct", "tag"), 1000),
    "hkdf_sha256": (("ikm", "salt", "info", "size", "okm"), 1000),
    "hkdf_sha384": (("ikm", "salt", "info", "size", "okm"), 1000),
}


def of_use(case: dict[str, Any]) -> bool:
    """Leave out what goes wrong before a peer's bytes arrive: seeds and sizes that we choose.

    Of ML-DSA TLS has the external interface with an empty context alone.
    """
    seed = len(case.get("seed", "0" * 128)) == 128 and "SizeTooLarge" not in case["flags"]
    empty = "ctx" not in case and not {"Internal", "IncorrectPrivateKeyLength"} & {*case["flags"]}
    return seed and empty and case.get("msg", "") is not None


def usable(group: dict[str, Any]) -> bool:
    """Whether a TLS 1.3 suite of ours uses these sizes."""
    return (
        group.get("ivSize", 96) == 96
        and group.get("tagSize", 128) == 128
        and (group["type"] != "AeadTest" or group["keySize"] in {128, 256})
    )


def main() -> None:
    """Write one file per primitive beside this script."""
    for name, (columns, most) in WANTED.items():
        source = json.loads((Path(sys.argv[1]) / f"{name}_test.json").read_text(encoding="utf-8"))
        seen: Counter[tuple[str, ...]] = Counter()
        rows = []
        for group in filter(usable, source["testGroups"]):
            for case in filter(of_use, group["tests"]):
                kind = (case["result"], *case["flags"])
                seen[kind] += 1
                if seen[kind] <= most:
                    values = [
                        case[column] if column in case else group[column] for column in columns
                    ]
                    rows.append([case["tcId"], case["result"], *values])
        text = ",\n".join(json.dumps(row) for row in rows)
        head = json.dumps(["tcId", "result", *columns])
        path = Path(__file__).with_name(f"{name}.json")
        path.write_text(f'{{"columns": {head}, "rows": [\n{text}\n]}}\n', encoding="ascii")


if __name__ == "__main__":
    main()
