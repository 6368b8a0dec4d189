"""What any program must do that makes one file of others: read them, write the file, and hash what it wrote.

    python benchmarks/read_write.py OUT BYTES HASHES FILE...

Reads every FILE once, writes BYTES of what it read to OUT, and takes the SHA-256 of OUT as often as HASHES says.
"""

import hashlib
import os
import sys
from pathlib import Path

PIECE = 4 << 20


def main() -> None:
    out, size, hashes, files = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), map(Path, sys.argv[4:])
    piece = bytearray(PIECE)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(piece):
                pass
    with out.open("wb", buffering=0) as written:
        for at in range(0, size, PIECE):
            written.write(memoryview(piece)[: min(PIECE, size - at)])
        os.fsync(written.fileno())
    for _ in range(hashes):
        with out.open("rb") as file:
            hashlib.file_digest(file, "sha256")


if __name__ == "__main__":
    main()
