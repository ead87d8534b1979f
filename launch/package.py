"""The project as one file that workers unpack: what git tracks, as it lies in the folder now."""

import dataclasses
import gzip
import hashlib
import io
import pathlib
import subprocess
import tarfile

from clipa_t5x.errors import UserError


@dataclasses.dataclass(frozen=True)
class Package:
    """`content`: a gzipped tar; `digest`: what names it, the same for the same files."""

    content: bytes
    digest: str


def pack(folder: str) -> Package:
    """Packs the files that git tracks, with their changes; nothing that it does not.

    So neither data nor credentials that lie about are sent, and no file that is ignored.

    Args:
      folder: of a git checkout, or within one.

    Raises:
      UserError: it is none, or it tracks nothing.
    """
    command = ["git", "-C", folder, "ls-files", "-z"]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise UserError("git is not installed: it says which files are the package's.") from error
    except subprocess.CalledProcessError as error:
        fact = error.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise UserError(
            f"package is {folder!r}, of which git says: {' '.join(fact)} (files that it tracks are "
            "sent; or give --image)."
        ) from error
    root = pathlib.Path(folder)
    names = sorted(set(filter(None, listed.decode("utf-8", "surrogateescape").split("\0"))))
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            if (root / name).is_symlink() or (root / name).is_file():
                archive.add(root / name, name, recursive=False, filter=_anonymous)
        if not archive.getmembers():
            raise UserError(f"package is {folder!r}, of which git tracks no file: add some.")
    plain = buffer.getvalue()
    return Package(gzip.compress(plain, mtime=0), hashlib.sha256(plain).hexdigest()[:16])


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without what differs from one checkout to the next."""
    member.uid = member.gid = member.mtime = 0
    member.uname = member.gname = ""
    member.mode = 0o755 if member.mode & 0o100 else 0o644
    return member
