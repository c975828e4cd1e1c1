"""``python select_vectors.py OUTPUT``: of what ETSI's program prints, the vectors that are here."""

import json
import re
import sys
from pathlib import Path

CURVES = {"prime256v1", "secp384r1", "X25519"}
TITLE = re.compile(r"(Cat|Cas)KDF as HKDF(?:/HMAC)? with (SHA\d+), ECDH with (\S+), and (\S+)")


def cases(text: str) -> list[dict[str, str]]:
    """Those with HKDF and a curve that this library has; the random ones are left out."""
    found: list[dict[str, str]] = []
    wanted = False
    for line in text.splitlines():
        name, equals, value = (part.strip() for part in line.partition("="))
        if match := TITLE.match(line):
            wanted = match[3] in CURVES
            if wanted:
                method, hash_name, curve, kem = match.groups()
                found.append(
                    {"method": f"{method}KDF", "hash": hash_name.lower(), "ecdh": curve, "kem": kem}
                )
        elif "KDF as" in line:
            wanted = False
        elif wanted and line.startswith("CID"):
            found[-1]["cid"] = line.split()[1]
        elif wanted and equals and re.fullmatch(r"[0-9A-F]+", value):
            found[-1].setdefault(name, value.lower())
    return found


def main() -> None:
    text = Path(sys.argv[1]).read_text(encoding="ascii", errors="replace")
    text = text.partition("Derandomized")[0]
    target = Path(__file__).with_name("hkdf.json")
    target.write_text(json.dumps({"cases": cases(text)}, indent=0) + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
