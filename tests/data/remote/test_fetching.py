"""Files from URLs: whole and checked, or not at all; several at once."""

from __future__ import annotations

import errno
import gzip
import http.server
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from mepa_ds.data.remote import fetching
from mepa_ds.data.remote.fetching import Transfer, content_of, fetch, fetch_all, json_text, whole_archive, whole_tar
from mepa_ds.errors import DamagedError, UserError
from mepa_ds.files import sha256_of_file
from tests.data.remote.odd_servers import send, serving
from tests.data.shard_fixtures import make_set

PAGE = b"<!DOCTYPE html><html><body>Please log in</body></html>"
SECRET = "b1946ac92492d234"
with_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="http is opened with curl")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def tar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("set")
    return directory / make_set(directory, "images", [4]).shards[0].name


def anything(path: Path, digest: str) -> None:
    pass


def fetched(url: str, path: Path) -> bytes:
    fetch(url, path, anything)
    return path.read_bytes()


def is_empty(directory: Path) -> bool:
    return not directory.exists() or not list(directory.iterdir())


def test_a_fetch_that_fails_at_first_is_tried_again(tmp_path: Path) -> None:
    script = tmp_path / "flaky.sh"
    script.write_text(f"if mkdir {tmp_path}/tried 2>/dev/null; then exit 3; fi; echo content\n")
    assert fetched(f"pipe:sh {script}", tmp_path / "here") == b"content\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("echo 'broken: no such bucket' >&2; exit 1", "broken: no such bucket; check the address"),
        ("head -c 300000 /dev/zero >&2; echo; echo last >&2; exit 1", "last; check the address"),
        ("printf half; exit 4", "its command ended with status 4"),
        ("kill -9 $$", "its command ended with status -9"),
        (f"echo 'GET https://h/x?sig={SECRET} failed: 403' >&2; exit 1", "may need a login or have expired"),
    ],
)
def test_what_a_command_complains_of_is_in_the_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, said: str
) -> None:
    with pytest.raises(DamagedError, match="cannot be fetched: ") as caught:
        fetch(f"pipe:{command}", tmp_path / "to" / "here", anything)
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)
    assert is_empty(tmp_path / "to")
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("command", "check", "said"),
    [
        ("cat {tar}", whole_tar, None),
        ("head -c 1500 {tar}", whole_tar, "truncated"),
        ("head -c -1024 {tar} | head -c 2048", whole_tar, "truncated"),
        ("true", whole_tar, "it is empty;"),
        ("nosuchcommand {tar} | cat", whole_tar, "it is empty: .*nosuchcommand: not found;"),
        ("gzip -c {tar}", whole_tar, "it is compressed"),
        ("cat {page}", whole_tar, "a page came in its place .*<!DOCTYPE html>.*login"),
        ("cat {page}", json_text, "a page came in its place"),
        ("echo '{{'", json_text, "it is no JSON"),
        ("cat {page}", whole_archive, "a page came in its place"),
        ("head -c 700 {offset_index}", whole_archive, "it is no .npz file"),
        ("cat {offset_index}", whole_archive, None),
        ("head -c 1500 {tar}", content_of("", 99), "it has 1500 bytes, the index says 99"),
        ("cat {page}", content_of("", 99), "a page came in its place .*, it has 54 bytes, the index says 99"),
        ("head -c 1500 {tar}", content_of("", 1500), "truncated"),
        ("cat {tar}", content_of("ab", 20480), "its SHA-256 differs from the index's"),
    ],
)
def test_what_is_not_whole_is_thrown_away(
    tmp_path: Path, tar: Path, command: str, check: fetching.Check, said: str | None
) -> None:
    (tmp_path / "page").write_bytes(PAGE)
    command = command.format(tar=tar, page=tmp_path / "page", offset_index=tar.with_suffix(".idx.npz"))
    url, path = f"pipe:echo >> {tmp_path}/log; {command}", tmp_path / "to" / "here"
    if said is None:
        fetch(url, path, check)
        assert path.exists()
        return
    for starts in (1, 2):  # asked for again by each start, but not three times when the same comes twice
        with pytest.raises(DamagedError, match=rf"cannot be fetched: .*{said}.*nothing of it was kept"):
            fetch(url, path, check)
        assert is_empty(path.parent)
        assert len((tmp_path / "log").read_bytes()) == 2 * starts


@with_curl
def test_a_transfer_cut_without_a_length_is_asked_for_again(tmp_path: Path, tar: Path) -> None:
    """As by a proxy: the first two answers end in the middle, and nothing says that they were to be longer."""
    content, lengths = tar.read_bytes(), iter([1000, 3000])
    with serving(lambda request: send(request, content[: next(lengths, None)])) as server:
        fetch(f"{server}/0.tar", tmp_path / "here", whole_tar)
    assert (tmp_path / "here").read_bytes() == content


@with_curl
def test_a_redirect_to_a_login_page(tmp_path: Path) -> None:
    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        if request.path.startswith("/login"):
            send(request, PAGE)
            return
        request.send_response(302)
        request.send_header("Location", f"/login?back={SECRET}")
        request.end_headers()

    with (
        serving(answer) as server,
        pytest.raises(DamagedError, match=r"/0\.tar\?\.\.\.: cannot be fetched: a page .* login") as caught,
    ):
        fetch(f"{server}/0.tar?sig={SECRET}", tmp_path / "to" / "here", whole_tar)
    assert SECRET not in str(caught.value)
    assert is_empty(tmp_path / "to")


@with_curl
def test_servers_that_compress_or_refuse(tmp_path: Path, tar: Path) -> None:
    content, asked = tar.read_bytes(), list[str | None]()

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(request.headers["Accept-Encoding"])
        if request.path == "/gone":
            request.send_error(403)
        else:
            send(request, gzip.compress(content), Content_Encoding="gzip")

    with serving(answer) as server:
        fetch(f"{server}/0.tar", tmp_path / "here", whole_tar)
        assert (tmp_path / "here").read_bytes() == content
        assert asked == ["identity"]
        with pytest.raises(DamagedError, match=r"403; the address may need a login or have expired: get a new one"):
            fetch(f"{server}/gone", tmp_path / "there", whole_tar)


@with_curl
def test_signatures_of_any_length_and_signs(tmp_path: Path) -> None:
    asked = list[str]()
    query = "sig=" + "A" * 4000 + '&x=[1-3]{a,b}%22"\\'

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        send(request, b"content")

    with serving(answer) as server:
        assert fetched(f"{server}/0.tar?{query}", tmp_path / "here") == b"content"
    assert asked == [f"/0.tar?{query}"]


@with_curl
def test_an_address_is_no_option(tmp_path: Path) -> None:
    with pytest.raises(DamagedError, match="cannot be fetched: the address holds a control character"):
        fetch(f'https://127.0.0.1:9/x"\noutput = "{tmp_path}/y', tmp_path / "here", anything)


def test_a_program_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="aws: the program for such URLs is not installed here; install it"):
        fetch("s3://bucket/0.tar", tmp_path / "here", anything)


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is no damage of a shard, which on_damaged=skip would leave out."""
    for number, said in ((errno.ENOSPC, "disk or quota is full"), (errno.EROFS, "cannot write there: Read-only")):

        def refuse(*_: object, number: int = number) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("mepa_ds.files.os.replace", refuse)
        with pytest.raises(UserError, match=said) as caught:
            fetch("pipe:echo content", tmp_path / "to" / "here", anything)
        assert not isinstance(caught.value, DamagedError)
        assert is_empty(tmp_path / "to")


def test_a_directory_that_is_removed_meanwhile(tmp_path: Path) -> None:
    script = f"if mkdir {tmp_path}/tried 2>/dev/null; then rm -r {tmp_path}/to; fi; echo content"
    assert fetched(f"pipe:{script}", tmp_path / "to" / "here") == b"content\n"


def copy(directory: Path, number: int, transfer: Transfer) -> int:
    fetch(f"pipe:cat {directory}/{number}", directory / f"to-{number}", anything, transfer)
    return number


def test_several_at_once_in_order(tmp_path: Path) -> None:
    """Four wait for each other."""
    met = threading.Barrier(4, timeout=60)

    def work(number: int, transfer: Transfer) -> int:
        met.wait()
        return copy(tmp_path, number, transfer)

    for number in range(8):
        (tmp_path / str(number)).write_text(str(number))
    assert fetch_all(work, range(8), "copying") == list(range(8))
    assert [(tmp_path / f"to-{number}").read_text() for number in range(8)] == list("01234567")
    assert fetch_all(work, [], "copying") == []


def test_after_an_error_what_is_under_way_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And no more begun: a second start has the rest to do."""
    (tmp_path / "0").write_text("0")
    failed, begun = threading.Event(), list[int]()

    def work(number: int, transfer: Transfer) -> int:
        begun.append(number)
        if number == 0:
            failed.wait(60)  # under way when the other one fails
            return copy(tmp_path, number, transfer)
        if number == 1:
            failed.set()
            raise DamagedError("number 1")
        transfer.stop.wait(0.1)
        return number

    monkeypatch.setattr(fetching, "_AT_ONCE", 2)
    with pytest.raises(DamagedError, match="number 1"):
        fetch_all(work, range(1000), "copying")
    assert (tmp_path / "to-0").read_text() == "0"
    assert len(begun) < 500


def is_running(pid: int) -> bool:
    """Whether a process is there, and no zombie that nobody has asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_ctrl_c_leaves_no_torn_file_and_no_process(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = f"sh -c 'echo $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 300' | (printf half; cat)"
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        while not pid.exists() or not list(tmp_path.glob("to/.*.tmp")):
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    def work(url: str, transfer: Transfer) -> None:
        fetch(url, tmp_path / "to" / "here", anything, transfer)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        fetch_all(work, [f"pipe:{script}"], "copying")
    assert is_empty(tmp_path / "to")
    deadline = time.monotonic() + 60
    while is_running(int(pid.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_checksum_is_looked_at(tmp_path: Path, tar: Path) -> None:
    entry = (sha256_of_file(tar), tar.stat().st_size)
    fetch(f"pipe:cat {tar}", tmp_path / "here", content_of(*entry))
    assert (tmp_path / "here").read_bytes() == tar.read_bytes()
