"""Results appear whole or not at all."""

import pytest

from memdlm.errors import DataError
from memdlm.files import replace_files, replace_folder


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path):
    place = tmp_path / "a" / "result"
    with replace_folder(place) as folder:
        (folder / "one").write_text("1")
        assert not place.exists()
    with pytest.raises(FileNotFoundError), replace_folder(place) as folder:
        (folder / "none" / "two").write_text("2")
    assert [path.name for path in place.iterdir()] == ["one"]
    with replace_folder(place) as folder:
        (folder / "three").write_text("3")
    assert [path.name for path in place.iterdir()] == ["three"]
    assert list(place.parent.iterdir()) == [place]


def test_files_are_replaced_together(tmp_path):
    replace_files({tmp_path / "x" / "a": b"1", tmp_path / "y": b"2"})
    with pytest.raises(TypeError):
        replace_files({tmp_path / "x" / "a": b"3", tmp_path / "y": "no bytes"})
    assert (tmp_path / "x" / "a").read_bytes() == b"1"
    assert {path.name for path in tmp_path.rglob("*")} == {"x", "a", "y"}
    with pytest.raises(DataError, match="is, or lies under, a file"):
        replace_files({tmp_path / "y" / "z": b""})
