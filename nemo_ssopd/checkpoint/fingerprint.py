"""The fingerprint of a base model: a hash of its weights, read without torch or Megatron."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path


@cache
def base_fingerprint(path: str) -> str:
    """Return the SHA-256 over names, types, shapes and values of all tensors in a Hugging Face directory.

    The split into files does not matter. Tensors of up to 1 MiB count whole, larger ones by 16 spread blocks of 64 KiB:
    any training run changes those.
    """
    digest = hashlib.sha256()
    for name, description, blocks in sorted(_tensor_samples(Path(path)), key=lambda sample: sample[0]):
        digest.update(f"{name} {description}\n".encode())
        for block in blocks():
            digest.update(block)
    return digest.hexdigest()


def _tensor_samples(path: Path) -> Iterator[tuple[str, str, Callable[[], Iterator[bytes]]]]:
    block, count = 64 * 1024, 16
    for file in sorted(path.glob("*.safetensors")):
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(header_bytes))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, stop = (8 + header_bytes + offset for offset in entry["data_offsets"])

            def blocks(file: Path = file, start: int = start, stop: int = stop) -> Iterator[bytes]:
                size = stop - start
                with open(file, "rb") as opened:
                    if size <= block * count:
                        opened.seek(start)
                        yield opened.read(size)
                    else:
                        for i in range(count):
                            opened.seek(start + i * (size - block) // (count - 1))
                            yield opened.read(block)

            yield name, f"{entry['dtype']} {entry['shape']}", blocks
