"""Files that would create another file, the canary, if anything unpickled them."""

import io
import pathlib
import pickle
import zipfile

import numpy as np


class _Creates:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(self.path),)


def pickled(canary, protocol=2):
    """A pickle."""
    return pickle.dumps({"weights": _Creates(canary)}, protocol)


def torch_zip(canary):
    """What torch.save writes: a zip archive of a pickle and of raw data."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", pickled(canary))
        archive.writestr("archive/data/0", bytes(64))
        archive.writestr("archive/version", "3\n")
    return buffer.getvalue()


def object_npz(canary):
    """An archive of an array of objects."""
    buffer = io.BytesIO()
    np.savez(buffer, weights=np.array([_Creates(canary)], object))
    return buffer.getvalue()
