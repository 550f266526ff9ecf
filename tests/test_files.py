"""Files of a run are replaced whole or not at all."""

import os

import pytest

from robustkern.training.files import write_atomically


def test_atomic_write_replaces_or_leaves_alone(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def fails(file):
        file.write(b"new, but not all of")
        raise ValueError("half way")

    with pytest.raises(ValueError, match="half way"):
        write_atomically(path, fails)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
