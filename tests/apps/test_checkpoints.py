import os
from dataclasses import dataclass
from pathlib import Path

from talk3d.apps.checkpoints import checkpoint_beside, fingerprint, remove_checkpoints, sha256_of


@dataclass(frozen=True)
class Settings:
    steps: int = 3


def test_fingerprints_follow_content(tmp_path: Path) -> None:
    path = tmp_path / "person"
    path.write_bytes(b"abc")
    first = fingerprint(path, Settings(), 0)
    copy = tmp_path / "copy"
    copy.write_bytes(b"abc")
    assert fingerprint(copy, Settings(), 0) == first
    assert fingerprint(copy, Settings(steps=4), 0) != first
    assert fingerprint(copy, Settings(), 1) != first
    path.write_bytes(b"abd")
    assert fingerprint(path, Settings(), 0) != first


def test_fingerprints_of_folders_follow_their_files(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    first = fingerprint(tmp_path)
    assert fingerprint(tmp_path) == first
    os.utime(tmp_path / "a", (1, 1))
    assert fingerprint(tmp_path) != first


def test_sha256_is_the_standard_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_only_the_checkpoints_of_one_output_are_removed(tmp_path: Path) -> None:
    mine, other = checkpoint_beside(tmp_path / "a[1].t3d", 1), checkpoint_beside(tmp_path / "b.t3d", 1)
    earlier = checkpoint_beside(tmp_path / "a[1].t3d", 2)
    for path in (mine, other, earlier):
        path.touch()
    remove_checkpoints(tmp_path / "a[1].t3d")
    assert list(tmp_path.iterdir()) == [other]
