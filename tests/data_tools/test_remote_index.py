"""Sets and shards behind URLs that are signed, cut or interrupted: scanned, fetched, built from."""

from __future__ import annotations

import http.server
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from mepa_ds import progress
from mepa_ds.data.remote import fetching
from mepa_ds.data.remote.remote_file import REMOTE_NAME, RemoteShards
from mepa_ds.data.shard_set import ShardSet
from mepa_ds.data.shards.index import ShardIndex, offset_index_path
from mepa_ds.data_tools.build_shards import build
from mepa_ds.data_tools.merge_index import Remote, Scan
from mepa_ds.data_tools.readers.webdataset import WebDataset
from mepa_ds.data_tools.remote_index import CacheOptions
from mepa_ds.errors import DamagedError, UserError
from tests.data.remote.odd_servers import send, serving
from tests.data.shard_fixtures import make_set
from tests.data_tools.build_fixtures import images_of, options

SIZES = (3, 4, 2)
SECRET = "b1946ac92492d234"
LONG = f"X-Amz-Security-Token={'A' * 400}&X-Amz-Signature={SECRET}"
SHORT = f"sv=2022-11-02&sp=rl&sig={SECRET}%3D"


class Store:
    """A store of signed objects: `far`, as it is or as tests make it; it remembers what it was asked for."""

    def __init__(self, far: Path):
        self.far, self.asked = far, list[str]()
        self.broken: dict[str, bytes] = {}
        """Names of objects to what comes in their place."""
        self.url = ""

    def answer(self, request: http.server.BaseHTTPRequestHandler) -> None:
        path, _, query = request.path.partition("?")
        name = path.rpartition("/")[2]
        self.asked.append(name)
        if SECRET not in query:
            request.send_error(403)
        elif name in self.broken:
            send(request, self.broken[name])
        elif (self.far / name).exists():
            send(request, (self.far / name).read_bytes())
        else:
            request.send_error(404)

    def tars(self, query: str) -> str:
        return f"{self.url}/c/shard-{{000000..000002}}.tar?{query}"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    if shutil.which("curl") is None:
        pytest.skip("http is opened with curl")
    monkeypatch.setattr(fetching, "_PAUSE_SECONDS", 0.0)
    make_set(tmp_path / "far", "images", SIZES)
    store = Store(tmp_path / "far")
    with serving(store.answer) as store.url:
        yield store


def cache(tmp_path: Path) -> CacheOptions:
    return CacheOptions(str(tmp_path / "cache"))


def holds_the_secret(directory: Path) -> list[str]:
    """Files whose name or content has the signature, but for remote.json, which must."""
    found = [path for path in directory.rglob("*") if SECRET in str(path) or len(path.name) > 150]
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != REMOTE_NAME]
    return [str(path) for path in [*found, *(path for path in files if SECRET.encode() in path.read_bytes())]]


@pytest.fixture
def told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress in a file begins with the work, and not after seconds: its lines must not tell the secret either."""
    monkeypatch.setattr(progress, "_FIRST_SECONDS", 0.0)


@pytest.mark.parametrize("query", [LONG, SHORT])
@pytest.mark.usefixtures("told_at_once")
def test_signed_shards_are_scanned(tmp_path: Path, store: Store, capfd: pytest.CaptureFixture[str], query: str) -> None:
    index = Scan(store.tars(query), tmp_path / "near", cache=cache(tmp_path))()
    assert index.shards == ShardIndex.read(store.far).shards
    near, far = ShardSet(tmp_path / "near"), ShardSet(store.far)
    assert [near.read(number) for number in range(9)] == [far.read(number) for number in range(9)]
    assert holds_the_secret(tmp_path / "near") == holds_the_secret(tmp_path / "cache") == []
    said = capfd.readouterr()
    assert SECRET not in said.out + said.err
    assert "scanning" in said.err


@pytest.mark.usefixtures("told_at_once")
def test_a_build_from_signed_shards(tmp_path: Path, store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    """One that cannot be fetched ends it: without torn copies, and the next start asks for that one alone, even if all
    are signed anew."""
    out, content = tmp_path / "out", (store.far / "shard-000001.tar").read_bytes()
    for broken, said in ((content[:1500], "truncated"), (b"<html>Log in</html>", "a page came"), (b"", "it is empty")):
        store.broken = {"shard-000001.tar": broken}
        with pytest.raises(UserError, match=rf"shard-000001\.tar\?\.\.\.: cannot be fetched: .*{said}") as caught:
            build(WebDataset(store.tars(LONG)), options(out))
        assert SECRET not in str(caught.value)
        assert [path.name for path in out.rglob("*.tar")].count("shard-000001.tar") == 0
        assert holds_the_secret(out) == []
    store.broken = {}
    store.asked.clear()
    index = build(WebDataset(store.tars("X-Amz-Date=2&" + LONG)), options(out))
    assert index is not None
    assert "shard-000001.tar" in store.asked
    assert sorted(images_of(out)) == sorted(images_of(store.far))
    assert holds_the_secret(out) == []
    store.asked.clear()
    assert build(WebDataset(store.tars("X-Amz-Date=3&" + LONG)), options(out)) == index
    assert store.asked == []
    printed = capfd.readouterr()
    assert SECRET not in printed.out + printed.err
    assert "copying shards" in printed.err


def test_copies_that_are_there_are_not_asked_for_again(tmp_path: Path, store: Store) -> None:
    store.broken = {"shard-000002.tar": b""}
    with pytest.raises(DamagedError, match=r"shard-000002\.tar"):
        build(WebDataset(store.tars(SHORT)), options(tmp_path))
    copied = [path.name for path in (tmp_path / ".scratch").rglob("*.tar")]
    store.broken, store.asked = {}, []
    build(WebDataset(store.tars(SHORT)), options(tmp_path))
    assert sorted(store.asked) == sorted({f"shard-{number:06d}.tar" for number in range(3)} - set(copied))
    assert not (tmp_path / ".scratch").exists()


def test_a_pattern_that_names_a_shard_twice(tmp_path: Path, store: Store) -> None:
    """It is copied once, and read twice, as from local files."""
    index = build(WebDataset(f"{store.url}/c/shard-00000{{0,0,0,0}}.tar?{SHORT}"), options(tmp_path))
    assert store.asked == ["shard-000000.tar"]
    assert index is not None
    assert index.num_samples == 4 * SIZES[0]


def test_a_scan_that_was_interrupted_goes_on(tmp_path: Path, store: Store) -> None:
    near = tmp_path / "near"
    store.broken = {"shard-000001.tar": b"<html>"}
    with pytest.raises(DamagedError, match=r"shard-000001\.tar"):
        Scan(store.tars(SHORT), near, cache=cache(tmp_path))()
    with pytest.raises(UserError, match=r"no index\.json there"):
        ShardSet(near)
    scanned = [path.name for path in near.glob("*.npz")]
    store.broken, store.asked = {}, []
    index = Scan(store.tars("sr=c&" + SHORT), near, cache=cache(tmp_path))()
    assert index.shards == ShardIndex.read(store.far).shards
    wanted = {f"shard-{number:06d}" for number in range(3)} - {name.removesuffix(".idx.npz") for name in scanned}
    assert sorted(store.asked) == sorted(f"{name}.tar" for name in wanted)


def test_a_scan_of_other_shards_does_not_go_on_with_these(tmp_path: Path, store: Store) -> None:
    near = tmp_path / "near"
    index = Scan(store.tars(SHORT), near, cache=cache(tmp_path))()
    make_set(tmp_path / "other", "images", (5, 2, 2))
    store.far = tmp_path / "other"
    again = Scan(store.tars(SHORT), near, cache=cache(tmp_path))()  # asked for once more: all of it
    assert again.shards == ShardIndex.read(store.far).shards != index.shards
    elsewhere = Scan(store.tars(SHORT).replace("/c/", "/d/"), near, cache=cache(tmp_path))()
    assert elsewhere == again
    assert sorted(store.asked) == sorted(shard.name for shard in (*index.shards,) * 3)


def test_signed_anew_a_scan_keeps_its_index(tmp_path: Path, store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    """Signatures last for days, sets longer: nothing is fetched again for new ones."""
    near = tmp_path / "near"
    index = Scan(store.tars("Expires=1&" + SHORT), near, cache=cache(tmp_path))()
    store.asked.clear()
    assert Scan(store.tars("Expires=2&" + SHORT), near, cache=cache(tmp_path))() == index
    assert store.asked == []
    remote = RemoteShards.read(near)
    assert remote is not None
    assert all("Expires=2" in url for url in remote.urls)
    assert "signed anew; their index is kept" in capsys.readouterr().out


def test_names_that_would_be_the_same(tmp_path: Path, store: Store) -> None:
    """`get?id=1` and `get?id=2`."""
    urls = f"pipe:cat {store.far}/shard-00000{{0..2}}.tar '{tmp_path}/get?id=x'"
    (tmp_path / "get?id=x").touch()
    index = Scan(urls.replace(".tar", ".{tar,tar}"), tmp_path / "near", cache=cache(tmp_path))()
    assert [shard.name[:7] for shard in index.shards] == [f"{number:06d}-" for number in range(6)]
    assert ShardSet(tmp_path / "near").read(3)[0] == "000000000"


def test_a_set_behind_a_signed_url(tmp_path: Path, store: Store, capfd: pytest.CaptureFixture[str]) -> None:
    """The names of its files go before the query."""
    near = tmp_path / "near"
    Remote(f"{store.url}/c/?{SHORT}", near, cache(tmp_path))()
    assert ShardSet(near).read(4) == ShardSet(store.far).read(4)
    assert holds_the_secret(near) == []
    assert {path.name for path in near.glob(".*")} == set()
    store.asked.clear()
    Remote(f"{store.url}/c?{SHORT}", near, cache(tmp_path))()
    assert store.asked == ["index.json"]
    with pytest.raises(DamagedError, match=r"c/index\.json\?\.\.\.: cannot be fetched: .*403; the address may need"):
        Remote(f"{store.url}/c?sig=other", near, cache(tmp_path))()
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.parametrize("damage", ["page", "cut", "other"])
def test_tables_that_are_not_the_indexs(tmp_path: Path, store: Store, damage: str) -> None:
    offset_index = offset_index_path(store.far / "shard-000001.tar")
    make_set(tmp_path / "other", "images", (3, 5, 2))
    content = {
        "page": b"<html>",
        "cut": offset_index.read_bytes()[:-30],
        "other": (tmp_path / "other" / offset_index.name).read_bytes(),
    }
    said = {"page": "a page came", "cut": "it is no .npz file", "other": "of another version of the shard"}[damage]
    store.broken = {offset_index.name: content[damage]}
    with pytest.raises(DamagedError, match=rf"shard-000001\.idx\.npz\?\.\.\.: cannot be fetched: .*{said}"):
        Remote(f"{store.url}/c?{SHORT}", tmp_path / "near", cache(tmp_path))()
    assert not (tmp_path / "near" / offset_index.name).exists()
    store.broken = {}
    Remote(f"{store.url}/c?{SHORT}", tmp_path / "near", cache(tmp_path))()
    assert ShardSet(tmp_path / "near").read(4) == ShardSet(store.far).read(4)


def test_shards_without_checksums_are_looked_at(tmp_path: Path, store: Store) -> None:
    """Of an index that others wrote: a cut shard is damage, and asked for again by the next start."""
    near = tmp_path / "near"
    Scan(store.tars(SHORT), near, cache=cache(tmp_path))()
    index = json.loads((near / "index.json").read_text())
    for shard in index["shards"]:
        shard["sha256"] = ""
    (near / "index.json").write_text(json.dumps(index))
    store.broken = {"shard-000000.tar": (store.far / "shard-000000.tar").read_bytes()[:1536]}
    with pytest.raises(DamagedError, match="has 1536 bytes, the index says 10240"):
        ShardSet(near).read(0)
    store.broken = {}
    shutil.rmtree(tmp_path / "cache")
    assert ShardSet(near).read(0) == ShardSet(store.far).read(0)
