"""``send`` and ``receive`` with a large file: ``python benchmarks/transfer.py [--size BYTES]``.

Time, the rate of the file and of the wire, and the resident memory of both processes while the file
goes over: at the beginning, in the middle, at the end, and the most. The source is sparse, so it
takes no room; what arrives is written, and takes ``--size`` bytes of the temporary folder. At the
end ``cmp`` compares the two.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMAND = [sys.executable, "-m", "hybridkex"]
MEASURED = ("VmRSS", "VmHWM")


def memory(pid: int) -> dict[str, float]:
    """Return the present and the peak resident memory in MB."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: re.search(rf"{name}:\s+(\d+) kB", status) for name in MEASURED}
    return {name: int(match[1]) * 1024 / 1e6 for name, match in found.items() if match}


def main() -> None:
    """Transfer the file once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--size", type=float, default=10e9, help="bytes (default: 10e9)")
    size = int(parser.parse_args().size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([*COMMAND, "dev-ca", folder / "keys"], check=True, capture_output=True)
        identity = [
            word
            for part in ("ca", "cert", "key")
            for word in (f"--{part}", str(folder / "keys" / f"{part}.pem"))
        ]
        with (folder / "source").open("wb") as file:
            file.truncate(size)
        port_file = folder / "port"
        address = ["--bind", "127.0.0.1", "--port", "0", "--port-file", port_file]
        receiver = subprocess.Popen(
            [*COMMAND, "receive", folder / "in", *address, *identity], stderr=subprocess.DEVNULL
        )
        while not port_file.exists():
            assert receiver.poll() is None
            time.sleep(0.05)
        began = time.monotonic()
        to = f"localhost:{port_file.read_text().strip()}"
        sender = subprocess.Popen(
            [*COMMAND, "send", folder / "source", to, *identity], stderr=subprocess.PIPE, text=True
        )
        partial, marks = folder / "in" / ".hybridkex-partial", [0.01, 0.5, 0.99]
        print(f"{size:,} bytes; resident memory in MB, sender and receiver")
        most = [0.0, 0.0]
        while sender.poll() is None:
            try:
                now = [memory(one.pid) for one in (sender, receiver)]
                most = [max(old, new["VmHWM"]) for old, new in zip(most, now, strict=True)]
                done = sum(part.stat().st_size for part in partial.glob("*")) / size
            except (FileNotFoundError, KeyError, ProcessLookupError):
                continue
            if marks and done >= marks[0]:
                print(
                    f"  {marks.pop(0):4.0%}   " + "   ".join(f"{one['VmRSS']:6.1f}" for one in now)
                )
            time.sleep(0.05)
        seconds = time.monotonic() - began
        assert sender.stderr is not None
        print("  most   " + "   ".join(f"{value:6.1f}" for value in most))
        print(f"{seconds:.1f} s with the start of the sender; it says:")
        print(sender.stderr.read().strip().splitlines()[-1])
        assert sender.returncode == 0
        receiver.terminate()
        receiver.wait(30)
        same = subprocess.run(["cmp", folder / "source", folder / "in" / "source"], check=False)
        print("the two files are the same" if same.returncode == 0 else "THE FILES DIFFER")


if __name__ == "__main__":
    main()
