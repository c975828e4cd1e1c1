"""Make the files for two sites: ``python make_sites.py FOLDER``; compose.yaml uses them.

Each KME gets a folder with its certificate, its sealing key and ``kme.toml``, and each SAE a folder
with its certificate. One authority signs all certificates, and its key is not stored.
"""

import argparse
from pathlib import Path

from hybridkex.auth.dev_ca import DevCa, identity_files
from hybridkex.files import PRIVATE, PUBLIC, write_files
from hybridkex.qkd.store import new_key_file

SITES = (("kme-a", "alice", "postgres-a"), ("kme-b", "bob", "postgres-b"))

CONFIG = """\
metrics = "0.0.0.0:9464"

[[kme]]
id = "{kme}"
listen = "0.0.0.0:{port}"
saes = ["{sae}"]
ca = "ca.pem"
certificate = "cert.pem"
key = "key.pem"
store = "postgresql://kme:kme@{database}/kme"
key_file = "store.key"

[[kme.peer]]
id = "{peer}"
saes = ["{peer_sae}"]
url = "https://{peer}:{port}"
"""


def make_sites(folder: Path, port: int = 8443) -> None:
    """Write the files, all or none."""
    ca = DevCa.create("two sites")
    files: dict[Path, tuple[bytes, int]] = {}
    for index, (kme, sae, database) in enumerate(SITES):
        peer, peer_sae, _ = SITES[1 - index]
        for holder in (kme, sae):
            identity = ca.issue(kme, "localhost", "127.0.0.1", common_name=holder)
            files |= identity_files(folder / holder, ca, identity)
        files[folder / kme / "store.key"] = new_key_file(), PRIVATE
        values = {"kme": kme, "sae": sae, "database": database, "port": port}
        text = CONFIG.format(**values, peer=peer, peer_sae=peer_sae)
        files[folder / kme / "kme.toml"] = text.encode(), PUBLIC
    write_files(files)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    make_sites(parser.parse_args().folder)
