"""Damages files of a checkpoint as disks, networks and people do."""

import os
import pathlib
import random


def flip_a_bit(path: pathlib.Path, rng: random.Random) -> str:
    """Flips one bit of a file; returns what was done."""
    data = bytearray(path.read_bytes())
    position, bit = rng.randrange(len(data)), rng.randrange(8)
    data[position] ^= 1 << bit
    path.write_bytes(data)
    return f"bit {bit} of byte {position} flipped"


def truncate(path: pathlib.Path, rng: random.Random) -> str:
    """Cuts a file off anywhere."""
    size = rng.randrange(path.stat().st_size)
    os.truncate(path, size)
    return f"cut to {size} bytes"


def remove(path: pathlib.Path, rng: random.Random) -> str:
    """Loses a file."""
    del rng
    path.unlink()
    return "removed"


def append(path: pathlib.Path, rng: random.Random) -> str:
    """Adds to a file."""
    with path.open("ab") as file:
        file.write(rng.randbytes(rng.randrange(1, 100)))
    return "added to"


KINDS = (flip_a_bit, truncate, remove, append)


def damage(checkpoint: pathlib.Path, rng: random.Random, kinds=KINDS) -> str:
    """Damages a random file of a checkpoint, each byte of it as likely as any, or each file."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file() and path.stat().st_size)
    by_size = rng.random() < 0.5
    weights = [path.stat().st_size if by_size else 1 for path in files]
    path = rng.choices(files, weights)[0]
    done = rng.choice(kinds)(path, rng)
    return f"{path.relative_to(checkpoint)}: {done}"
