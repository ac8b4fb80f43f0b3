"""Files are written whole or not at all; of folders tests of saving tell."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mwtool.errors import OutputError
from mwtool.files.atomic_write import check_writable, write


def test_a_file_is_replaced_whole_and_has_the_usual_mode(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text("former, and longer than what comes")
    write(path, "new")
    assert path.read_text() == "new"
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, signal, sys
from pathlib import Path
from mwtool.files.atomic_write import write

os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
write(Path(sys.argv[1]), "half")
"""


@pytest.mark.parametrize("name", ["[a]*.json", "\u6f22" * 85])
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path, name: str) -> None:
    path, others = tmp_path / name, {f".{name[:9]}.swp", f".{name[:50]}.12345678", ".other.12345678.incomplete"}
    for other in others:
        (tmp_path / other).write_text("mine")
    write(path, "before")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.iterdir())) == 2 + len(others)
    assert path.read_text() == "before"
    write(path, "after")
    assert {one.name for one in tmp_path.iterdir()} == {name, *others}
    assert path.read_text() == "after"


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "result.json", os.fsync

    def meanwhile(handle: int) -> None:
        monkeypatch.setattr(os, "fsync", synced)
        write(path, "the other's")
        assert path.read_text() == "the other's"
        synced(handle)

    monkeypatch.setattr(os, "fsync", meanwhile)
    write(path, "ours")
    assert path.read_text() == "ours"
    assert [one.name for one in tmp_path.iterdir()] == ["result.json"]


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
