"""Files are written whole or not at all; of folders tests of saving tell."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mwtool.errors import OutputError
from mwtool.whole import check_writable, write


def test_a_file_is_replaced_whole_and_has_the_usual_mode(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("former, and longer than what comes")
    write(path, "new")
    assert path.read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    for content in ("first", "second"):
        write(tmp_path / "link", content)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "target").read_text() == content


def test_a_pipe_is_written_to_directly(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = [sys.executable, "-c", "import sys; sys.stdout.write(open(sys.argv[1]).read())", str(pipe)]
    with subprocess.Popen(reader, stdout=subprocess.PIPE, text=True) as running:
        write(pipe, "through")
        assert running.communicate()[0] == "through"
    assert pipe.is_fifo()


def test_where_nothing_can_be_written_is_known_beforehand(tmp_path: Path) -> None:
    check_writable(tmp_path / "new.json")
    for path, words in ((tmp_path, "is a folder"), (tmp_path / "none" / "x.json", "does not exist")):
        with pytest.raises(OutputError, match=words):
            check_writable(path)
