import io
import struct
import tracemalloc
import zipfile
import zlib

import jax.numpy as jnp
import numpy as np
import pytest
from numpy.lib import format as npy_format
from weights import malicious

from clipa_t5x.errors import UserError
from clipa_t5x.weights.npz_files import open_npz

ARRAYS = {
    "a/kernel": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.float64(2.5),
    "columns": np.asfortranarray(np.arange(12, dtype=np.int16).reshape(3, 4)),
    "big_endian": np.arange(5, dtype=">f4"),
    "half": np.arange(4).astype(np.float16),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.array([True, False]),
}


def npy(header, data=b"", version=(1, 0)):
    """A .npy file with a header of any text."""
    text = header.encode() + b"\n"
    return b"\x93NUMPY" + bytes(version) + struct.pack("<H", len(text)) + text + data


def write(path, members, method=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return str(path)


def refused(path):
    with pytest.raises(UserError) as info, open_npz(path) as arrays:
        for array in arrays.values():
            array.read()
    assert "\n" not in str(info.value)
    assert path in str(info.value)
    return str(info.value)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    path = str(tmp_path / "weights.npz")
    save(path, **ARRAYS)
    with open_npz(path) as arrays:
        assert set(arrays) == set(ARRAYS)
        for name, wanted in ARRAYS.items():
            assert arrays[name].shape == np.shape(wanted)
            found = arrays[name].read()
            assert found.dtype == arrays[name].dtype == wanted.dtype.newbyteorder("=")
            np.testing.assert_array_equal(found, wanted)


def test_two_bytes_without_a_meaning_are_bfloat16(tmp_path):
    path = str(tmp_path / "weights.npz")
    wanted = jnp.asarray([1.0, -2.5, 3e38], jnp.bfloat16)
    np.savez(path, w=np.asarray(wanted).view("V2"), same=np.asarray(wanted))
    with open_npz(path) as arrays:
        for name in ("w", "same"):
            assert arrays[name].dtype == jnp.bfloat16
            np.testing.assert_array_equal(arrays[name].read(), np.asarray(wanted))


def test_shapes_are_known_while_no_array_is_in_memory(tmp_path):
    path = str(tmp_path / "weights.npz")
    np.savez_compressed(path, w=np.zeros((1024, 8192), np.float32))
    tracemalloc.start()
    with open_npz(path) as arrays:
        assert arrays["w"].shape == (1024, 8192)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_objects_are_refused_by_their_name(tmp_path):
    canary = tmp_path / "canary"
    path = tmp_path / "weights.npz"
    path.write_bytes(malicious.object_npz(canary))
    message = refused(str(path))
    assert "pickle" in message
    assert "'weights'" in message
    assert not canary.exists()
    with np.load(path, allow_pickle=True) as archive:  # the archive is as bad as it should be
        archive["weights"]
    assert canary.exists()


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (3,), }", "12 bytes, and has 8"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (1,), }", "4 bytes, and has 8"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,), }", "damaged"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (True, 2), }", "damaged"),
        (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({2**62}, 8), }}", "has 8"),
        (f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({'9' * 3000}, 8), }}", "has 8"),
        ("{'descr': '<c8', 'fortran_order': False, 'shape': (1,), }", "dtype '<c8'"),
        ("{'descr': '<U2', 'fortran_order': False, 'shape': (1,), }", "dtype '<U2'"),
        ("{'descr': '|V8', 'fortran_order': False, 'shape': (1,), }", "dtype '|V8'"),
        ("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", "pickle"),
        ("{'descr': [('x', '|O')], 'fortran_order': False, 'shape': (1,), }", "pickle"),
        ("{'descr': [('x', '<f4')], 'fortran_order': False, 'shape': (2,), }", "dtype"),
        ("{'descr': ('<f4', (2,)), 'fortran_order': False, 'shape': (1,), }", "dtype"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), 'x': 1}", "damaged"),
        ("{'descr': '<f4', 'fortran_order': False}", "damaged"),
        ("__import__('os').abort()", "damaged"),
        ("(" * 3000, "damaged"),
        ("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }" + " " * 9000, "damaged"),
        ("\0", "damaged"),
    ],
)
def test_headers_that_do_not_fit_are_refused(tmp_path, header, words):
    path = write(tmp_path / "w.npz", [("w.npy", npy(header, bytes(8)))])
    assert words in refused(path)


def test_a_version_with_names_of_fields_is_refused(tmp_path):
    header = "{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }"
    path = write(tmp_path / "w.npz", [("w.npy", npy(header, bytes(8), (3, 0)))])
    assert "version (3, 0)" in refused(path)


def array_bytes(array):
    buffer = io.BytesIO()
    npy_format.write_array(buffer, array, allow_pickle=False)
    return buffer.getvalue()


GOOD = array_bytes(np.arange(1000, dtype=np.float32))


def test_a_member_that_is_no_array_is_refused(tmp_path):
    path = write(tmp_path / "w.npz", [("w.npy", GOOD), ("../../etc/cron.d/x", b"* * * * *")])
    assert "'../../etc/cron.d/x' is no .npy file" in refused(path)


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    with pytest.warns(UserWarning, match="Duplicate"):
        path = write(tmp_path / "w.npz", [("w.npy", GOOD), ("w.npy", GOOD)])
    assert "twice" in refused(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_other_compressions_are_refused(tmp_path, method):
    assert "compressed" in refused(write(tmp_path / "w.npz", [("w.npy", GOOD)], method))


def directory(path):
    """(bytes, where the first entry of the directory begins)."""
    data = bytearray(path.read_bytes())
    return data, data.index(b"PK\x01\x02")


def test_encrypted_members_are_refused(tmp_path):
    path = tmp_path / "w.npz"
    write(path, [("w.npy", GOOD)])
    data, entry = directory(path)
    data[entry + 8] |= 1
    path.write_bytes(data)
    assert "encrypted" in refused(str(path))


def test_a_size_that_cannot_come_from_what_is_there_is_refused(tmp_path):
    path = tmp_path / "w.npz"
    write(path, [("w.npy", GOOD)], zipfile.ZIP_DEFLATED)
    data, entry = directory(path)
    data[entry + 24 : entry + 28] = struct.pack("<I", 2**31)
    path.write_bytes(data)
    assert f"states {2**31} bytes" in refused(str(path))


def test_members_that_share_their_bytes_are_refused(tmp_path):
    # The way of bombs: every entry of the directory points to the same compressed megabytes.
    path = tmp_path / "w.npz"
    write(path, [("a.npy", GOOD), ("b.npy", GOOD)])
    data, entry = directory(path)
    second = data.index(b"PK\x01\x02", entry + 4)
    data[second + 42 : second + 46] = struct.pack("<I", 0)
    path.write_bytes(data)
    assert "overlaps" in refused(str(path))


def test_more_data_than_the_directory_states_never_comes_out(tmp_path):
    # A stream of a megabyte that the directory says to be of the header's few bytes.
    path = tmp_path / "w.npz"
    header = npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2,), }", bytes(8))
    stream = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed = stream.compress(header + bytes(2**20)) + stream.flush()
    write(path, [("w.npy", header + bytes(2**20))], zipfile.ZIP_DEFLATED)
    data, entry = directory(path)
    assert struct.unpack_from("<I", data, entry + 20)[0] <= 2 * len(packed)
    data[entry + 24 : entry + 28] = struct.pack("<I", len(header))
    path.write_bytes(data)
    assert "CRC" in refused(str(path))


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "w.npz"
    write(path, [("w.npy", GOOD)])
    data = bytearray(path.read_bytes())
    data[2000] ^= 4
    path.write_bytes(data)
    with open_npz(str(path)) as arrays:  # The header is whole: only reading finds it.
        assert arrays["w"].shape == (1000,)
    assert "CRC" in refused(str(path))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated_archives_are_refused(tmp_path, share):
    path = tmp_path / "w.npz"
    write(path, [("w.npy", GOOD)])
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(str(path))
