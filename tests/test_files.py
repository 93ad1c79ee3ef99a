"""Files are whole or absent, whoever writes them at the same time, and nothing but files is written over."""

from __future__ import annotations

import os
import platform
import threading
from pathlib import Path

import pytest
from loader_fixtures import refused

from skvq.engine.errors import SkvqError
from skvq.engine.filters import AttentionSinks
from skvq.engine.identity import _rule_name
from skvq.loaders.files import atomic_file, require_writable, write_atomically


def test_of_several_writers_the_last_wins_and_readers_see_whole_files(tmp_path: Path) -> None:
    path, failures = tmp_path / "a.session", []

    def write(letter: bytes) -> None:
        try:
            for count in range(1, 60):
                with atomic_file(path, count) as file:
                    for _ in range(count):
                        file.write(letter * 1000)
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=write, args=(letter,)) for letter in (b"a", b"b", b"c")]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        if path.exists():
            held = path.read_bytes()
            assert len(held) % 1000 == 0 and len(set(held)) == 1
    assert not failures and os.listdir(tmp_path) == ["a.session"]


def test_what_dead_processes_left_is_removed_and_what_others_write_is_not(tmp_path: Path) -> None:
    here = platform.node()
    dead, alive = tmp_path / f".a.{here}.999999999-1.partial", tmp_path / f".a.{here}.{os.getppid()}-1.partial"
    elsewhere = tmp_path / ".a.another-machine.999999999-1.partial"
    for left in (dead, alive, elsewhere):
        left.write_bytes(b"x")
    require_writable(tmp_path / "a")
    assert not dead.exists(), "a run that writes nothing leaves no more than it found"
    dead.write_bytes(b"x")
    write_atomically(tmp_path / "a", b"y")
    assert not dead.exists() and alive.exists() and elsewhere.exists() and (tmp_path / "a").read_bytes() == b"y"


def test_links_are_followed(tmp_path: Path) -> None:
    target, link = tmp_path / "target", tmp_path / "link"
    target.write_bytes(b"x")
    link.symlink_to(target)
    require_writable(link)
    write_atomically(link, b"y")
    assert link.is_symlink() and target.read_bytes() == b"y"


def test_a_name_that_is_too_long_is_one_line(tmp_path: Path) -> None:
    for write in (require_writable, lambda path: write_atomically(path, b"x")):
        with pytest.raises(SkvqError, match=r"cannot write .* name too long"):
            write(tmp_path / ("x" * 300))


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path, told in ((pipe, "a device or a pipe"), (tmp_path, "Is a directory"), (Path(""), "Is a directory")):
        refused(lambda path=path: require_writable(path), "cannot write", told)  # type: ignore[misc]
        refused(lambda path=path: write_atomically(path, b"x"), "cannot write", told)  # type: ignore[misc]
    assert pipe.is_fifo()
    refused(lambda: require_writable(Path("a\0b")), "cannot write 'a\\x00b'", "null")


@pytest.mark.parametrize("kept, same", [(50, True), (7, False)])
def test_a_rule_is_known_by_what_it_holds(kept: int, same: bool) -> None:
    class Keep:
        budget, needs_attention_mass = 8, False

        def __init__(self, n: int) -> None:
            self.n, self.made = n, object()

    assert (_rule_name(Keep(50)) == _rule_name(Keep(kept))) == same  # type: ignore[arg-type]
    assert _rule_name(AttentionSinks(5)) == "AttentionSinks(n=5)"
