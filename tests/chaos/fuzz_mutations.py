"""Ways to spoil bytes, text and JSON; every choice is drawn from the generator that is given."""

import json
import re
import struct
import zlib

# Where counting ends, overflows, or was never meant to begin.
NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 127, 128, 255, 256, 1023, 4096, 32767, 32768, 65535, 65536),
    *(2**24, 2**31 - 1, 2**31, -(2**31), 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1, 2**63),
    *(-(2**63), 2**64 - 1, 2**64, 10**30),
)
_TEXTS = (
    *(
        b"",
        b"\0",
        b"../../../../canary",
        b"/dev/zero",
        b"/etc/passwd",
        b"\xff\xfe",
        b"\xed\xa0\x80",
    ),
    *(b"%n%s%x", b"NaN", b"Infinity", b"-0", b"1e999", b"null", b"__class__", b"\r\n", b"\x1b[2J"),
    *("\u202e\u0000\U0010ffff".encode(), b"A" * 3000, b"(" * 3000, b"[" * 3000, b'{"a":' * 1500),
    b"__import__('os').system('touch canary')",
)


def _place(rng, data):
    return rng.randrange(len(data) + 1)


def _span(rng, data):
    """(start, end), short ones as likely as long ones."""
    start = _place(rng, data)
    return start, min(len(data), start + 2 ** rng.randrange(12))


def flip_bits(rng, data):
    spoilt = bytearray(data)
    for _ in range(2 ** rng.randrange(6) if data else 0):
        spoilt[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(spoilt)


def truncate(rng, data):
    return data[: _place(rng, data)]


def delete(rng, data):
    start, end = _span(rng, data)
    return data[:start] + data[end:]


def duplicate(rng, data):
    start, end = _span(rng, data)
    return data[:end] + data[start:end] * 2 ** rng.randrange(4) + data[end:]


def splice(rng, data, other):
    """The beginning of one and the end of another."""
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def insert_text(rng, data):
    start, end = _span(rng, data)
    return data[:start] + rng.choice(_TEXTS) + data[rng.choice((start, end)) :]


def insert_noise(rng, data):
    start = _place(rng, data)
    return data[:start] + rng.randbytes(2 ** rng.randrange(10)) + data[start:]


def set_field(rng, data):
    """A number of 1 to 8 bytes is another, of either order."""
    size = rng.choice((1, 2, 4, 8))
    value = (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, rng.choice(("little", "big")))
    start = _place(rng, data)
    return data[:start] + value + data[start + size :]


def set_digits(rng, data):
    """A number spelled in digits is another."""
    numbers = list(re.finditer(rb"-?\d+", data[: 2**16]))
    if not numbers:
        return set_field(rng, data)
    found = rng.choice(numbers)
    return data[: found.start()] + b"%d" % rng.choice(NUMBERS) + data[found.end() :]


_ONE = (flip_bits, truncate, delete, duplicate, insert_text, insert_noise, set_field, set_digits)


def spoil(rng, data, others=()):
    """Applies one to three of the above."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        if others and rng.random() < 0.1:
            data = splice(rng, data, rng.choice(others))
        else:
            data = rng.choice(_ONE)(rng, data)
    return data


def spoil_text(rng, text):
    """Lines dropped, repeated, swapped; words exchanged; brackets, quotes and signs strewn in."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        i, j = rng.randrange(len(lines)), rng.randrange(len(lines))
        way = rng.randrange(7)
        if way == 0:
            del lines[i : i + rng.choice((1, 3))]
            lines = lines or [""]
        elif way == 1:
            lines.insert(i, lines[j])
        elif way == 2:
            lines[i], lines[j] = lines[j], lines[i]
        elif way == 3:
            lines[i] = _exchange_word(rng, lines[i], lines[j])
        elif way == 4:
            lines[i] = rng.choice((" ", "\t", "    ", "\ufeff", "\x0c")) + lines[i]
        else:
            at = rng.randrange(len(lines[i]) + 1)
            lines[i] = lines[i][:at] + rng.choice(_SIGNS) + lines[i][at:]
    return "\n".join(lines)


_SIGNS = (
    *(
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        "'",
        '"',
        "'''",
        "@",
        "%",
        "/",
        "\\",
        "=",
        ",",
        ":",
        "#",
        ".",
        "-",
    ),
    *(
        "\0",
        "\r",
        "\u2028",
        "\U0001f600",
        "(" * 500,
        "[" * 2000,
        "-" * 3000,
        "9" * 5000,
        "a." * 2000,
    ),
    *(
        "@a/b()",
        "%gin.REQUIRED",
        "lambda: 0",
        "1e999",
        "0x",
        "1_0",
        "f'{1}'",
        "b'x'",
        "None",
        "...",
    ),
    *(
        "__import__('os').system('touch canary')",
        "@os.system()",
        "\nimport os\n",
        "\ninclude 'x.gin'\n",
    ),
)


def _exchange_word(rng, line, other):
    words, others = re.findall(r"\S+", line), re.findall(r"\S+", other)
    if not words or not others:
        return line
    return line.replace(rng.choice(words), rng.choice((*others, str(rng.choice(NUMBERS)))), 1)


VALUES = (
    *NUMBERS,
    *(None, True, False, 0.5, float("nan"), float("inf"), [], {}, [[]], [None], {"a": 1}, [1, "a"]),
    *("", "a", "../../canary", "\x1b[2J", "/dev/zero", "a" * 3000, "\ud800", {"": None}),
)


def spoil_json(rng, value):
    """Members exchanged for values of any type, dropped, added or repeated elsewhere; as JSON."""
    value = _copy(value)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = _spoil_member(rng, value)
    return json.dumps(value).encode()


def _copy(value):
    return json.loads(json.dumps(value))


def _spoil_member(rng, value):
    found = list(places(value))
    if not found or rng.random() < 0.02:
        return _copy(rng.choice(VALUES))
    parent, key = rng.choice(found)
    way = rng.randrange(8)
    if way == 0:
        del parent[key]
    elif way == 1:
        other, there = rng.choice(found)
        parent[key] = _copy(other[there])
    elif way == 2 and isinstance(parent, dict):
        parent[rng.choice(("a", "", key + "x", "../x"))] = parent.pop(key)
    elif way == 3 and isinstance(parent, list):
        parent.append(_copy(parent[key]))
    else:
        parent[key] = _copy(rng.choice(VALUES))
    return value


def places(value):
    """(container, key) of every value within another."""
    if not isinstance(value, dict | list):
        return
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        yield from places(inner)


def number_field(rng, size, order="little"):
    """A number of NUMBERS as so many bytes."""
    return (rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, order)


def with_checksums_of_png(data):
    """Chunks' checksums as they would be, so that what was spoilt within them is looked at."""
    at, result = 8, bytearray(data[:8])
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        chunk = data[at + 4 : at + 8 + length]
        result += data[at : at + 4] + chunk + struct.pack(">I", zlib.crc32(chunk))
        at += 12 + length
    return bytes(result) + data[at:]


def spoil_folder(rng, files, keep):
    """A file is missing, empty, a folder, another's content, or has another's name.

    Args:
      rng: the generator.
      files: by path.
      keep: the path that stays as it is.
    """
    files = dict(files)
    path, other = (rng.choice([path for path in files if path != keep]) for _ in range(2))
    data = files.pop(path)
    way = rng.randrange(5)
    if way == 1:
        files[path] = b""
    elif way == 2:
        files[f"{path}/inside"] = data
    elif way == 3:
        files[path] = files.get(other, b"")
    elif way == 4:
        files[rng.choice((f"{path}.tmp", f"{path}x", other))] = data
    return files
