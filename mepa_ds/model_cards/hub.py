"""The way of an exported directory to a hub, through huggingface_hub; only when somebody asks for it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mepa_ds.errors import UserError

_LOGIN = "log in (hf auth login), or set HF_TOKEN to a token that may write"
_REFUSED = (401, 403)


def check_repository(repository: str) -> None:
    """Raises UserError for a name that no repository can have, and where nobody is logged in."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repository)
        if repository.count("/") != 1:
            raise HFValidationError(f"got {repository!r}")
    except HFValidationError as error:
        raise UserError(f"--push-to-hub: expected OWNER/NAME, such as jane/digits-mepa: {error}") from error
    if huggingface_hub.get_token() is None:
        raise UserError(f"--push-to-hub: nobody is logged in to the hub here; {_LOGIN}")


def push(directory: Path, repository: str, files: Sequence[str], private: bool) -> str:
    """Uploads the files of these patterns to a model repository, which is made if it is not there. Returns its URL.

    Raises:
        UserError: the hub cannot be reached, or refuses.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
    api = huggingface_hub.HfApi(library_name="mepa_ds")
    paths = sorted({path for pattern in files for path in directory.glob(pattern) if path.is_file()})
    added = [huggingface_hub.CommitOperationAdd(str(path.relative_to(directory)), path) for path in paths]
    kept = f"{directory} is complete: the same command again goes on from there"
    try:
        url = api.create_repo(repository, private=private, exist_ok=True)
        api.create_commit(repository, added, commit_message="Model by mepa_ds")
    except OfflineModeIsEnabled as error:
        raise UserError(f"--push-to-hub: HF_HUB_OFFLINE is set; unset it. {kept}") from error
    except HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        said = " ".join((getattr(error, "server_message", None) or "").split())
        why = f"status {status}" + (f", {said}" if said else "")
        remedy = f"{_LOGIN} to {repository}" if status in _REFUSED else "try again"
        raise UserError(f"--push-to-hub: the hub at {api.endpoint} refuses ({why}); {remedy}. {kept}") from error
    except _unreachable() as error:
        raise UserError(
            f"--push-to-hub: the hub at {api.endpoint} cannot be reached ({type(error).__name__}); look at the "
            f"network. {kept}"
        ) from error
    return str(url)


def _unreachable() -> tuple[type[Exception], ...]:
    """What the libraries below raise without a network: hf_xet, requests (an OSError), httpx and its successor.

    Which of them huggingface_hub uses depends on its version.
    """
    used = [sys.modules[name] for name in ("httpx", "httpx2") if name in sys.modules]
    return (OSError, RuntimeError, *(module.TransportError for module in used))
