"""Results appear whole or not at all."""

import pytest

from memdlm.errors import DataError
from memdlm.files import replace_files


def test_files_are_replaced_together(tmp_path):
    replace_files({tmp_path / "x" / "a": b"1", tmp_path / "y": b"2"})
    with pytest.raises(TypeError):
        replace_files({tmp_path / "x" / "a": b"3", tmp_path / "y": "no bytes"})
    assert (tmp_path / "x" / "a").read_bytes() == b"1"
    assert {path.name for path in tmp_path.rglob("*")} == {"x", "a", "y"}
    with pytest.raises(DataError, match="is, or lies under, a file"):
        replace_files({tmp_path / "y" / "z": b""})
