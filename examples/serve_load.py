"""Load for 'dapt serve': good, oversized, corrupt, truncated and bomb-like images at once.

    python examples/serve_load.py http://127.0.0.1:8000 --seconds 30 --clients 8

Prints answers by kind of image and status, throughput, latency, and the server's memory before and
after (from its /metrics). Exits with 1 if an answer is another than the kind of image asks for.
"""

from __future__ import annotations

import argparse
import http.client
import io
import random
import re
import struct
import threading
import time
import zlib
from collections import Counter
from urllib.parse import urlsplit

from PIL import Image

# Kind -> share of the requests, and the statuses that are right; 429 always is.
KINDS = {
    "valid": (0.56, {200}),
    "three valid": (0.1, {200}),
    "oversized": (0.06, {413}),
    "corrupt": (0.08, {400}),
    "truncated": (0.08, {400}),
    "bomb": (0.08, {413}),
    "TIFF bomb": (0.04, {400}),  # a format that is not taken
}


def photo(seed: int, size: tuple[int, int] = (1024, 768)) -> bytes:
    """A JPEG of coloured noise, smoothed so that it has a photo's size."""
    noise = random.Random(seed).randbytes(32 * 24 * 3)
    file = io.BytesIO()
    small = Image.frombytes("RGB", (32, 24), noise)
    small.resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def bomb(side: int = 30_000) -> bytes:
    """A PNG of ``side`` x ``side`` black pixels: 2.7 GB once decoded, 2.6 MB as a file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    packer, row = zlib.compressobj(9), bytes(1 + 3 * side)
    pixels = b"".join([*(packer.compress(row) for _ in range(side)), packer.flush()])
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def tiff_bomb(side: int = 16_384) -> bytes:
    """A TIFF of 100 x 100 pixels in a tile of ``side`` x ``side``, which libtiff decodes whole."""
    packer = zlib.compressobj(9)
    tile = b"".join([*(packer.compress(bytes(3 * side)) for _ in range(side)), packer.flush()])
    entries = 11
    tags = {256: 100, 257: 100, 258: 8, 259: 8, 262: 2, 277: 3, 284: 1, 322: side, 323: side,
            324: 8 + 2 + 12 * entries + 4, 325: len(tile)}  # fmt: skip
    lines = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, entries) + lines + bytes(4) + tile


def form(images: list[bytes]) -> bytes:
    """A multipart body with the boundary 'limit'."""
    lines: list[bytes] = []
    for number, data in enumerate(images):
        name = f'form-data; name="images"; filename="{number}.jpg"'
        lines += [b"--limit", b"Content-Disposition: " + name.encode(), b"", data]
    return b"\r\n".join([*lines, b"--limit--", b""])


def bodies() -> dict[str, list[bytes]]:
    """Request bodies by kind."""
    photos = [photo(seed) for seed in range(20)]
    corrupt = [data[:600] + random.Random(1).randbytes(len(data) - 600) for data in photos[:5]]
    return {
        "valid": [form([data]) for data in photos],
        "three valid": [form(photos[i : i + 3]) for i in range(10)],
        "oversized": [form([photos[0] + bytes(21 * 2**20)])],
        # A signature and noise; noise after a JPEG's tables would often decode to something.
        "corrupt": [form([data[:3] + data[600:]]) for data in corrupt],
        "truncated": [form([data[: len(data) // 2]]) for data in photos],
        "bomb": [form([bomb()])],
        "TIFF bomb": [form([tiff_bomb()])],
    }


class Load:
    """Clients that ask as fast as they are answered, and what came of it."""

    def __init__(self, url: str, token: str | None) -> None:
        self.place = urlsplit(url).netloc
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}
        self.answers: Counter[tuple[str, str]] = Counter()
        self.seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
        self.wrong: list[str] = []
        self.lock = threading.Lock()

    def client(self, number: int, made: dict[str, list[bytes]], end: float) -> None:
        """Ask until ``end``."""
        generator = random.Random(number)
        connection = http.client.HTTPConnection(self.place, timeout=60)
        headers = {**self.headers, "Content-Type": "multipart/form-data; boundary=limit"}
        while time.monotonic() < end:
            (kind,) = generator.choices(list(KINDS), [share for share, _ in KINDS.values()])
            start = time.monotonic()
            try:
                connection.request("POST", "/predict", generator.choice(made[kind]), headers)
                answer = connection.getresponse()
                text, status = answer.read().decode(), str(answer.status)
            except OSError as error:
                connection.close()
                text, status = repr(error), type(error).__name__
            took = time.monotonic() - start
            with self.lock:
                self.answers[kind, status] += 1
                if status == "200":
                    self.seconds[kind].append(took)
                if status != "429" and status not in map(str, KINDS[kind][1]):
                    self.wrong.append(f"{kind}: {status} {text[:200]}")
            if status == "429":
                time.sleep(0.1)

    def memory(self) -> float:
        """The server's resident memory, MB."""
        connection = http.client.HTTPConnection(self.place, timeout=60)
        connection.request("GET", "/metrics", headers=self.headers)
        text = connection.getresponse().read().decode()
        found = re.search(r"^process_resident_memory_bytes (\S+)$", text, re.M)
        return float(found[1]) / 1e6 if found else float("nan")


def main() -> None:
    """Ask, then print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("url")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--token")
    given = parser.parse_args()
    load, made = Load(given.url, given.token), bodies()
    warm = threading.Thread(target=load.client, args=(0, made, time.monotonic() + 2))
    warm.start()
    warm.join()
    load.answers.clear()
    load.seconds = {kind: [] for kind in KINDS}
    memory, start = [load.memory()], time.monotonic()
    threads = [
        threading.Thread(target=load.client, args=(number, made, start + given.seconds))
        for number in range(1, given.clients + 1)
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        memory.append(load.memory())
    took = time.monotonic() - start
    for (kind, status), count in sorted(load.answers.items()):
        print(f"{kind:12} {status:>16} {count:7,}")
    images = len(load.seconds["valid"]) + 3 * len(load.seconds["three valid"])
    times = sorted(load.seconds["valid"])
    print(f"{sum(load.answers.values()) / took:.1f} requests/s, {images / took:.1f} images/s")
    if times:
        p50, p99 = times[len(times) // 2], times[int(0.99 * (len(times) - 1))]
        print(f"one valid image: p50 {1000 * p50:.0f} ms, p99 {1000 * p99:.0f} ms")
    middle = memory[len(memory) // 2]
    print(
        f"server memory: {memory[0]:.0f} MB before, {middle:.0f} halfway, {memory[-1]:.0f} after, "
        f"{max(memory):.0f} at most"
    )
    for line in load.wrong[:10]:
        print(f"wrong: {line}")
    raise SystemExit(1 if load.wrong else 0)


if __name__ == "__main__":
    main()
