"""Sets of strangers behind addresses: they run no command, open nothing but a list, and send no more than they say."""

from __future__ import annotations

import http.server
import json
import os
import shutil
import threading
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mepa_ds.config.pretrain import DataConfig
from mepa_ds.data.remote import schemes
from mepa_ds.data.remote.fetching import fetch, json_text
from mepa_ds.data.remote.openers import _asks, chunks_of
from mepa_ds.data.remote.remote_file import RemoteShards
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import INDEX_NAME
from mepa_ds.data.shards.writer import Manifest
from mepa_ds.data_tools import precompute
from mepa_ds.data_tools.remote_index import CacheOptions, Remote
from mepa_ds.errors import DamagedError, UserError
from tests.data.remote.cache_fixtures import make_remote, no_waiting
from tests.data.remote.odd_servers import send, serving
from tests.data.shard_fixtures import make_set

_no_waiting = pytest.fixture(autouse=True)(no_waiting)
with_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="http is opened with curl")
SECRET = "b1946ac92492d234"


def anything(path: Path, digest: str) -> None:
    pass


@pytest.mark.parametrize(
    "name",
    ["x;touch MARK;.tar", "$(touch MARK).tar", "`x`.tar", "a b.tar", "../a.tar", "/a.tar", "-rf.tar", ".a.tar",
     "a\n.tar", "a'b.tar", "é.tar", "", "a" * 200 + ".tar", "\x1b[31m.tar"],
)  # fmt: skip
def test_names_in_a_remote_index_are_words(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    far = tmp_path / "far"
    make_set(far, "images", [1])
    index = json.loads((far / INDEX_NAME).read_text())
    index["shards"][0]["name"] = name
    (far / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"is no name of a shard: .*rename the file") as caught:
        Remote(f"pipe:cat {far}/{{}}", tmp_path / "near")()
    assert not (tmp_path / "MARK").exists()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "near").exists()
    with pytest.raises(ValueError, match="is no name of a shard"):  # names of files that are to be written
        Manifest.model_validate_json(json.dumps({"kind": "images", "shard_names": [name], "made_by": index["made_by"]}))


def remote_set(tmp_path: Path, url: str) -> Path:
    directory = tmp_path / "set"
    make_set(directory, "images", [1])
    for tar in directory.glob("*.tar"):
        tar.unlink()
    content = {"urls": [url], "cache": str(tmp_path / "cache"), "cache_gigabytes": 1, "window": 1}
    (directory / "remote.json").write_text(json.dumps(content))
    return directory


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("pipe:touch {mark}", "names shell commands .*set data.remote_schemes=.pipe. in the recipe .*--remote-schemes"),
        ("file://{mark}", "names files of this machine"),
        ("scp://host/x", "SSH keys"),
        ("sftp://host/x", "SSH keys"),
        ("{mark}", "this is no address that is opened"),
        ("file:{mark}", "no address that is opened"),
        ("PIPE:touch {mark}", "no address that is opened"),
        (" pipe:touch {mark}", "no address that is opened"),
        ("ais://b/x", "ais: is no address"),
        ("htgs://b/x", "htgs: is no address"),
        ("gopher://b/x", "gopher: is no address"),
        ("dict://b/x", "dict: is no address"),
        ("http:x", "http: is no address"),
        ("-K{mark}", "no address"),
        ("http://h/x\noutput = {mark}", "control character"),
    ],
)
def test_a_data_directory_names_no_commands_and_no_files(tmp_path: Path, url: str, said: str) -> None:
    mark = tmp_path / "MARK"
    directory = remote_set(tmp_path, url.format(mark=mark))
    with pytest.raises(UserError, match=said):
        ShardSet(directory, "data.images").read(0)
    assert not mark.exists()


def test_the_users_word_is_enough(tmp_path: Path) -> None:
    """In a recipe, by an option, or on the command line that made the set; for this process, and not for others."""
    near = make_remote(tmp_path)
    assert ShardSet(near).read(0)[0] == "000000000"
    schemes.forget()
    with pytest.raises(UserError, match="names shell commands"):
        ShardSet(near)
    data = DataConfig.model_validate_json(json.dumps({"tokens": str(near), "remote_schemes": ["pipe"]}))
    schemes.allow(data.remote_schemes)
    assert ShardSet(near).read(20)[0] == "000000020"
    with pytest.raises(ValueError, match="remote_schemes"):
        DataConfig.model_validate_json(json.dumps({"tokens": "x", "remote_schemes": ["gopher"]}))


def test_commands_refuse_without_the_option(tmp_path: Path) -> None:
    """`mepa data precompute`, as the others that read sets."""
    mark = tmp_path / "MARK"
    directory = remote_set(tmp_path, f"pipe:touch {mark}; exit 1")
    words = ["fit-teacher", "patch-pca", str(directory), "--out", str(tmp_path / "t")]
    with pytest.raises(UserError, match="names shell commands"):
        precompute.main(words)
    assert not mark.exists()
    with pytest.raises(DamagedError, match="cannot be fetched"):
        precompute.main([*words, "--remote-schemes", "pipe"])
    assert mark.exists()


def test_a_name_is_quoted_in_a_command() -> None:
    assert Remote("pipe:cat far/{}", Path("x"))._url("a b;c") == "pipe:cat far/'a b;c'"
    assert Remote("pipe:cat far/{}", Path("x"))._url("a-0.tar") == "pipe:cat far/a-0.tar"


def test_the_user_is_told_what_a_set_of_commands_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_remote(tmp_path)
    assert "to use this set, set data.remote_schemes=[pipe]" in capsys.readouterr().out


@with_curl
def test_a_redirect_leads_to_no_other_scheme(tmp_path: Path) -> None:
    (tmp_path / "private").write_text(SECRET)
    targets = [f"file://{tmp_path}/private", "ftp://127.0.0.1:9/x", "gopher://127.0.0.1:9/x"]

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        request.send_response(302)
        request.send_header("Location", targets[int(request.path[1:])])
        request.end_headers()

    with serving(answer) as server:
        for number in range(len(targets)):
            with pytest.raises(DamagedError, match="cannot be fetched"):
                fetch(f"{server}/{number}", tmp_path / "to" / "here", anything)
    assert not (tmp_path / "to" / "here").exists()


@with_curl
def test_a_server_without_end_is_stopped(tmp_path: Path) -> None:
    asked = list[str]()

    def answer(request: http.server.BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(b"[" * 65536)
        except OSError:
            pass

    with serving(answer) as server:
        with pytest.raises(DamagedError, match=r"it has more than the 1000000 bytes expected; nothing of it was kept"):
            fetch(f"{server}/0.tar", tmp_path / "here", anything, None, 1_000_000)
        assert len(asked) == 1
        with pytest.raises(DamagedError, match="bytes expected"):  # of an index too
            Remote(f"{server}/", tmp_path / "near")()
    assert not list(tmp_path.glob("**/*.tmp"))


def test_a_shard_is_stopped_at_its_indexed_size(tmp_path: Path) -> None:
    near = make_remote(tmp_path)
    urls = json.loads((near / "remote.json").read_text())
    (near / "remote.json").write_text(json.dumps({**urls, "urls": ["pipe:cat /dev/zero"] * 6}))
    schemes.allow(["pipe"])
    with pytest.raises(DamagedError, match=r"it has more than the .* bytes expected"):
        ShardSet(near).read(0)


@with_curl
def test_a_length_that_is_announced_is_believed(tmp_path: Path) -> None:
    """Nothing is read of a terabyte."""
    with (
        serving(lambda request: send(request, b"x", Content_Length=str(1 << 40))) as server,
        pytest.raises(DamagedError, match=r"cannot be fetched: .*[Mm]aximum file size"),
    ):
        fetch(f"{server}/0.tar", tmp_path / "here", anything, None, 1000)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": NaN}', "nul", "\xff"])
def test_indices_that_are_no_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "index").write_bytes(text.encode("latin-1"))
    with pytest.raises(DamagedError, match="it is no JSON"):
        fetch(f"pipe:cat {tmp_path}/index", tmp_path / "here", json_text)


class Curl:
    """Stands in for curl: notes its command line and what it is told, and fails."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch):
        directory.mkdir()
        self.seen = directory / "seen"
        (directory / "curl").write_text(
            f'#!/bin/sh\necho "$@" > {self.seen}; cat >> {self.seen}.told; cat {self.seen}.told >&2; exit 22\n'
        )
        (directory / "curl").chmod(0o755)
        monkeypatch.setenv("PATH", f"{directory}:{os.environ['PATH']}")


def test_the_hubs_token_is_in_no_command_line_and_no_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    curl, token = Curl(tmp_path / "bin", monkeypatch), "hf_SECRETSECRETSECRET"
    place = types.SimpleNamespace(repo_id="a/b", path_in_repo="x.tar", repo_type="dataset", revision="main")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.HfFileSystem", lambda: types.SimpleNamespace(resolve_path=lambda _: place))
    with pytest.raises(DamagedError) as caught:
        fetch("hf://datasets/a/b/x.tar", tmp_path / "c" / "x.tar", anything)
    assert curl.seen.read_text() == "--config -\n"
    told = Path(f"{curl.seen}.told").read_text()
    assert f'header = "Authorization: Bearer {token}"' in told
    assert 'url = "https://huggingface.co/datasets/a/b/resolve/main/x.tar"' in told
    assert token not in str(caught.value)
    with pytest.raises(ValueError, match="control character"):
        _asks("https://h/x", 'x"\noutput = "y', None)


def test_passwords_and_signatures_reach_no_message_and_no_note(tmp_path: Path) -> None:
    url = f"http://me:{SECRET}@127.0.0.1:9/x.tar?X-Amz-Signature={SECRET}"
    near = remote_set(tmp_path, url)
    with pytest.raises(DamagedError) as caught:
        ShardSet(near).read(0)
    assert SECRET not in str(caught.value)
    (note,) = (tmp_path / "cache").rglob("*.failed")
    assert SECRET not in note.read_text()
    assert note.stat().st_mode & 0o777 == 0o600
    RemoteShards(urls=(url,), cache="x", cache_gigabytes=1, window=1).write(tmp_path)
    assert (tmp_path / "remote.json").stat().st_mode & 0o777 == 0o600


def test_what_is_opened_is_a_list(tmp_path: Path) -> None:
    for url in ("ais://b/x", "x", "/etc/passwd", "file:///dev/zero", "htgs://x/y"):
        with pytest.raises((ValueError, OSError)):
            next(chunks_of(url, threading.Event(), []))
    (tmp_path / "x").write_text("content")
    assert list(chunks_of(f"file://{tmp_path}/x", threading.Event(), [])) == [b"content"]


def test_an_offset_index_from_a_server_is_checked(tmp_path: Path) -> None:
    """Before it is kept: its description is that of the shard, but its offsets are beyond the shard."""
    make_set(tmp_path / "far", "tokens", [2])
    (path,) = (tmp_path / "far").glob("*.npz")
    with np.load(path) as stored:
        arrays: dict[str, Any] = dict(stored)
    np.savez(path, **{**arrays, "offsets": arrays["offsets"] + (1 << 40)})
    with pytest.raises(DamagedError, match="it is no offset index of the shard: a member lies beyond"):
        Remote(f"pipe:cat {tmp_path}/far/{{}}", tmp_path / "near", CacheOptions(str(tmp_path / "c")))()
