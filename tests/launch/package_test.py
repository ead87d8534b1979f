import io
import os
import subprocess
import tarfile

from saved_runs import one_line_error

from launch import package


def checkout(folder, **files):
    folder.mkdir()
    subprocess.run(["git", "-C", str(folder), "init", "-q"], check=True)
    for name, text in files.items():
        (folder / name).write_text(text)
        subprocess.run(["git", "-C", str(folder), "add", name], check=True)
    return folder


def members(packed):
    with tarfile.open(fileobj=io.BytesIO(packed.content)) as archive:
        return {
            m.name: f"-> {m.linkname}" if m.issym() else archive.extractfile(m).read().decode()
            for m in archive.getmembers()
        }


def test_what_git_tracks_is_packed_as_it_lies_there(tmp_path):
    folder = checkout(tmp_path / "a", a="1", b="2", gone="3")
    (folder / "untracked").write_text("4")
    (folder / "a").write_text("changed")
    (folder / "gone").unlink()
    (folder / "link").symlink_to("a")
    subprocess.run(["git", "-C", str(folder), "add", "link"], check=True)
    assert members(package.pack(str(folder))) == {"a": "changed", "b": "2", "link": "-> a"}


def test_the_digest_is_of_names_and_contents_alone(tmp_path):
    one, two = (checkout(tmp_path / name, a="1", b="2") for name in "ab")
    os.utime(one / "a", (1, 1))
    (one / "b").chmod(0o600)
    first = package.pack(str(one))
    assert first == package.pack(str(two))
    (two / "b").write_text("3")
    assert package.pack(str(two)).digest != first.digest


def test_what_is_no_checkout_is_refused(tmp_path):
    one_line_error(lambda: package.pack(str(tmp_path)), str(tmp_path), "not a git repository")
    one_line_error(lambda: package.pack(str(tmp_path / "none")), "none", "No such file")
    one_line_error(lambda: package.pack(str(checkout(tmp_path / "a"))), "tracks no file")
