"""Files are written whole or not at all; what a killed write left beside them is deleted."""

import os

import pytest

from dapt.safe.files import TEMPORARY, delete_abandoned, open_regular, write_atomic


@pytest.mark.parametrize("name", ["log.csv", "a[1]*?.json", "\udcff\n"])
def test_only_old_leftovers_of_this_very_file_are_deleted(tmp_path, name):
    def leave(begin, end=TEMPORARY, age=48 * 3600):
        place = tmp_path / f".{begin}.{len(list(tmp_path.iterdir()))}{end}"
        place.write_text("part")
        os.utime(place, (place.stat().st_mtime - age,) * 2)
        return place

    old, folder = leave(name), tmp_path / f".{name}.folder{TEMPORARY}"
    (folder / "in" / "it").mkdir(parents=True)
    os.utime(folder, (0, 0))
    kept = [leave(name, age=60), leave("other"), leave(name, ".txt")]
    write_atomic(tmp_path / name, "whole")
    assert not old.exists()
    assert not folder.exists()
    assert sorted(tmp_path.iterdir()) == sorted([*kept, tmp_path / name])
    delete_abandoned(tmp_path / "nowhere", ".")


def test_no_more_than_a_limit_is_opened(tmp_path):
    file = tmp_path / "a"
    file.write_bytes(bytes(10))
    open_regular(file, 10).close()
    with pytest.raises(OSError, match="it has 10 bytes, and 9 are read at most"):
        open_regular(file, 9)
    with pytest.raises(OSError, match="it is a folder"):
        open_regular(tmp_path)
