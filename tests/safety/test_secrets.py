"""No secret that a text may hold is left in it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mepa_ds.safety.secrets import is_secret_name, redacted


@pytest.mark.parametrize(
    "text",
    [
        "https://me:MARK@host/x.tar",
        "s3://bucket/x?X-Amz-Signature=MARK&X-Amz-Expires=1: not found",
        "pipe:curl -H 'Authorization: Bearer MARK' https://host/x.tar | cat",
        "pipe:curl https://a@host/x?sig=MARK https://MARK@host/y#MARK",
        "curl: (22) header X-Api-Key: MARK",
        "Cookie: MARK",
        "wget --password=MARK --user=me",
        "log.wandb_api_key=MARK1234",
        "{'token'=MARK}",
        "refused: bearer MARK.MARK-MARK",
        "hf_MARKMARKMARK is no token",
        "ghp_MARKMARKMARKMARKMARKMARK",
        "AKIAMARKMARKMARKMARK",
    ],
)
def test_gone(text: str) -> None:
    assert "MARK" not in redacted(text)


def test_what_the_environment_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789MARK")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    assert redacted("login 0123456789MARK failed; /home/me/key.json") == "login ... failed; /home/me/key.json"


@pytest.mark.parametrize(
    "text",
    [
        "data.tokens: /data/imagenet: no such directory; did you mean 'data.features'?",
        "tokens=128 experts=8",
        "https://host/a/b.tar: cannot be fetched",
        "a key ends at the first dot; is it a.tar? [Y/n]",
    ],
)
def test_the_rest_stays(text: str) -> None:
    assert redacted(text) == text


@given(st.text(st.sampled_from("ab?#=&:/.@; \n"), max_size=30))
def test_a_message_of_messages_loses_nothing_more(text: str) -> None:
    once = redacted(f"https://host/x?sig={text}: because")
    assert redacted(f"cannot read: {once}; try again") == f"cannot read: {once}; try again"


@pytest.mark.parametrize(
    ("name", "is_secret"),
    [
        *((name, True) for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")),
        *((name, True) for name in ("DB_PASSWORD", "MY_SECRET", "COMET_API_KEY", "PGPASSWORD", "AZURE_STORAGE_KEY")),
        *((name, False) for name in ("PATH", "HF_HOME", "TOKENIZERS_PARALLELISM", "SLURM_JOB_ID", "KEYBOARD")),
    ],
)
def test_names_of_secrets(name: str, is_secret: bool) -> None:
    assert is_secret_name(name) == is_secret
