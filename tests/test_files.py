"""Files and folders that are there whole, or as they were."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from cabochon import files
from cabochon.files import flush_tree, hashes_below, sha256_of, whole, write_whole

WRITER = """
import sys, time
from pathlib import Path
from cabochon.files import whole
with whole(Path(sys.argv[1])) as path:
    path.write_text("of the other process")
    print("begun", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


def test_a_file_and_a_folder_appear_when_the_block_ends_and_not_before(tmp_path: Path) -> None:
    with whole(tmp_path / "deep" / "page.html") as path:
        path.write_text("page")
        assert path.name == "page.html"
        assert not (tmp_path / "deep" / "page.html").exists()
    with whole(tmp_path / "deep" / "rows") as folder:
        folder.mkdir()
        (folder / "a").write_text("a")
    assert (tmp_path / "deep" / "page.html").read_text() == "page"
    assert (tmp_path / "deep" / "rows" / "a").read_text() == "a"
    assert names(tmp_path / "deep") == ["page.html", "rows"]


@pytest.mark.parametrize("error", [OSError("no space left"), KeyboardInterrupt(), ValueError()])
def test_a_block_that_fails_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    write_whole(tmp_path / "page", "earlier")
    with pytest.raises(type(error)), whole(tmp_path / "page") as path:  # noqa: PT012
        path.write_text("half of the la")
        raise error
    assert (tmp_path / "page").read_text() == "earlier"
    assert names(tmp_path) == ["page"]


def test_a_folder_that_is_not_empty_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    write_whole(tmp_path / "rows" / "a", "earlier")
    with pytest.raises(OSError), whole(tmp_path / "rows") as folder:
        folder.mkdir()
    assert names(tmp_path / "rows") == ["a"]
    assert names(tmp_path) == ["rows"]


def test_the_bytes_are_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc to see which file a descriptor belongs to")
    events: list[str] = []
    monkeypatch.setattr(
        files.os, "fsync", lambda number: events.append(os.readlink(f"/proc/self/fd/{number}"))
    )
    with whole(tmp_path / "rows") as folder:
        folder.mkdir()
        (folder / "a").write_text("a")
        assert events == []
        aside = folder
    assert events == [str(aside / "a"), str(aside), str(tmp_path)]


def test_the_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_whole(tmp_path / "page", "")
    assert (tmp_path / "page").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_a_library_wrote_for_its_owner_alone_is_for_those_whom_the_umask_lets(
    tmp_path: Path,
) -> None:
    usual = tmp_path / "usual"
    usual.touch()
    with whole(tmp_path / "folder") as folder:
        folder.mkdir()
        for name in ("weights", "program"):
            (folder / name).touch()
        (folder / "weights").chmod(0o600)
        (folder / "program").chmod(0o700)
    assert (tmp_path / "folder" / "weights").stat().st_mode == usual.stat().st_mode
    assert (tmp_path / "folder" / "program").stat().st_mode & 0o777 == 0o700


def test_a_text_is_written_with_its_own_line_ends(tmp_path: Path) -> None:
    write_whole(tmp_path / "page", "é\r\n\n")
    assert (tmp_path / "page").read_bytes() == "é\r\n\n".encode()


def test_two_processes_that_write_one_place_do_not_meet_and_a_killed_one_leaves_nothing(
    tmp_path: Path,
) -> None:
    place = tmp_path / "page"
    with subprocess.Popen(
        [sys.executable, "-c", WRITER, str(place)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "begun\n"
        write_whole(place, "mine")
        left = [each for each in tmp_path.iterdir() if each != place]
        assert [names(each) for each in left] == [["page"]]  # still being written
        other.send_signal(signal.SIGKILL)
    assert place.read_text() == "mine"
    write_whole(place, "mine again")
    assert names(tmp_path) == ["page"]


def test_many_threads_that_write_one_place_leave_one_of_their_files_in_full(tmp_path: Path) -> None:
    texts = [f"{number}" * 5000 for number in range(8)]
    failed: list[BaseException] = []

    def write(text: str) -> None:
        try:
            for _ in range(20):
                write_whole(tmp_path / "page", text)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert (tmp_path / "page").read_text() in texts
    assert names(tmp_path) == ["page"]


def test_hashes_name_every_file_below(tmp_path: Path) -> None:
    (tmp_path / "b" / "c").mkdir(parents=True)
    (tmp_path / "b" / "c" / "d").write_bytes(b"gem")
    (tmp_path / "a").write_bytes(b"")
    digest = hashlib.sha256(b"gem").hexdigest()
    assert sha256_of(tmp_path / "b" / "c" / "d") == digest
    assert hashes_below(tmp_path) == {"a": hashlib.sha256(b"").hexdigest(), "b/c/d": digest}
    flush_tree(tmp_path)


def test_any_name_will_do(tmp_path: Path) -> None:
    """Nothing that is done aside is called as the caller may call the file."""
    for name in ("probe", "umask"):
        with whole(tmp_path / name) as aside:
            aside.mkdir()
            (aside / "file").write_text("x")
        assert (tmp_path / name / "file").read_text() == "x"
