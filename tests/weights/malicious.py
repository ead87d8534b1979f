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


def _archive(members):
    """A zip file whose bytes say nothing of when it was made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data)
    return buffer.getvalue()


def torch_zip(canary):
    """What torch.save writes: a zip archive of a pickle and of raw data."""
    raw = {"archive/data/0": bytes(64), "archive/version": "3\n"}
    return _archive({"archive/data.pkl": pickled(canary), **raw})


def object_npz(canary):
    """An archive of an array of objects."""
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Creates(canary)], object), allow_pickle=True)
    return _archive({"weights.npy": buffer.getvalue()})
