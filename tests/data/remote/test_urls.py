"""What of a URL may be seen, what it is compared by, and names of files."""

from __future__ import annotations

import pytest

from mepa_ds.data.remote.urls import file_names, is_remote, short_name, unsigned
from mepa_ds.safety.secrets import redacted

SECRET = "wJalrXUtnFEMI"
AMAZON = f"https://b.s3.amazonaws.com/t/0.tar?X-Amz-Credential={SECRET}%2Fus&X-Amz-Signature={SECRET}&response-type=x"
AZURE = f"https://a.blob.core.windows.net/c/0.tar?sv=2022-11-02&se=2026-10-15T10%3A00%3A00Z&sr=c&sp=rl&sig={SECRET}%3D"
GOOGLE = f"https://storage.googleapis.com/b/0.tar?X-Goog-Algorithm=GOOG4&X-Goog-Signature={SECRET}"
CLOUDFRONT = f"https://d1.cloudfront.net/0.tar?Expires=1700000000&Signature={SECRET}~&Key-Pair-Id={SECRET}"
USER = f"https://me:{SECRET}@host/0.tar"
HEADER = f"pipe:curl -s -H 'Authorization: Bearer {SECRET}' 'https://host/0.tar?token={SECRET}' | cat"
SIGNED = (AMAZON, AZURE, GOOGLE, CLOUDFRONT, USER, HEADER)


@pytest.mark.parametrize("url", SIGNED)
def test_what_gives_access_is_not_shown(url: str) -> None:
    for text in (url, f"GET {url}: 403", f"<Popen {[url]!r}>: exit 22", f"{url} {url}", url.removeprefix("pipe:")):
        assert SECRET not in redacted(text)
        assert "0.tar" in redacted(text)
    assert SECRET not in file_names([url])[0]
    assert SECRET not in unsigned(url)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (AMAZON, "https://b.s3.amazonaws.com/t/0.tar?..."),
        (USER, "https://host/0.tar"),
        (f"https://host/0.tar#access_token={SECRET}", "https://host/0.tar?..."),
        (f"https://a:p@ss@host/x and x-api-key: {SECRET}", "https://host/x and x-api-key: ..."),
        (f"bad request /0.tar?id=1&sig={SECRET} for user", "bad request /0.tar?id=1&sig=... for user"),
        ("pipe:cat /data/?.tar", "pipe:cat /data/?.tar"),
        ("user@host: no such file", "user@host: no such file"),
        ("what? (see https://host/help)", "what? (see https://host/help)"),
    ],
)
def test_the_rest_is_shown(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


def test_signed_anew_it_is_the_same() -> None:
    for url in SIGNED:
        assert unsigned(url) == unsigned(url.replace(SECRET, "anotherone"))
    assert unsigned(AZURE) == "https://a.blob.core.windows.net/c/0.tar"
    assert unsigned(AMAZON) == "https://b.s3.amazonaws.com/t/0.tar?response-type=x"
    assert unsigned("https://host/get?id=1&sig=a") != unsigned("https://host/get?id=2&sig=a")
    assert unsigned("pipe:cat 'a?b&c=1'") == "pipe:cat 'a?b&c=1'"


@pytest.mark.parametrize(
    ("url", "name"),
    [
        (AZURE, "0.tar"),
        (HEADER, "0.tar"),
        ("s3://bucket/a/train-01.tar", "train-01.tar"),
        ("gs://bucket/a b.tar", "a_b.tar"),
        ("hf://datasets/o/r/0.tar.gz", "0.tar.gz"),
        ("pipe:cat 0.tar", "0.tar"),
        ("pipe:cat '/far/0.tar?download=true'", "0.tar"),
        ("pipe:aws s3 cp s3://bucket/train-01.tar /dev/stdout", "train-01.tar"),
        ("pipe:curl -sL https://host/x.tgz -o - || true", "x.tgz"),
        ("https://host/0.tar;v=1", "0.tar"),
        ("https://host/.hidden.tar", "hidden.tar"),
        ("https://host/\udce9.tar", "_.tar"),
        ("http://[::1", "shard"),
        ("https://host/", "shard"),
        ("https://host", "shard"),
    ],
)
def test_names(url: str, name: str) -> None:
    assert file_names([url]) == [name]


def test_names_differ() -> None:
    assert file_names(["s3://b/a/0.tar", "s3://b/a/1.tar"]) == ["0.tar", "1.tar"]
    for urls in (
        ["https://h/get?id=1", "https://h/get?id=2"],
        ["h://a/0.tar", "h://b/0.tar"],
        ["h://a/x", "h://a/X.tar"],
    ):
        names = file_names(urls)
        assert [name[:7] for name in names] == ["000000-", "000001-"]
    assert file_names(["h://a/0.tar", "h://b/0.tar"]) == ["000000-0.tar", "000001-0.tar"]


@pytest.mark.parametrize("letter", ["x", "é", "漢"])
def test_long_names_fit_any_file_system(letter: str) -> None:
    long = [f"h://host/{letter * 400}{number}.tar" for number in range(2)]
    names = file_names(long)
    assert len(set(names)) == 2
    assert all(len(name.encode()) <= 120 and name.endswith(".tar") for name in names)
    assert file_names(long[:1]) == names[:1]
    assert short_name(names[0]) == names[0]


@pytest.mark.parametrize(
    ("url", "remote"),
    [("https://a/b", True), ("pipe:cat x", True), ("s3://b/k", True), ("/data/x", False), ("data/{0..3}.tar", False)],
)
def test_what_counts_as_remote(url: str, remote: bool) -> None:
    assert is_remote(url) == remote
