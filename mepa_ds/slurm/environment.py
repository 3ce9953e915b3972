"""Which variables of the submitter's environment a job gets: a list, so that what else is there stays where it is.

A job's environment is stored by SLURM's controller, copied to every node, and handed to every program that runs there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mepa_ds.errors import UserError
from mepa_ds.files import read_file
from mepa_ds.safety.secrets import is_secret_name
from mepa_ds.slurm.profile import Profile

_NAMES = frozenset(
    re.findall(
        r"\w+",
        "PATH HOME USER LOGNAME SHELL LANG LANGUAGE TZ TERM TMPDIR BASH_ENV ENV "
        "LD_LIBRARY_PATH LD_PRELOAD LIBRARY_PATH CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH CC CXX "
        "VIRTUAL_ENV MODULEPATH MODULESHOME LOADEDMODULES _LMFILES_ "
        "XDG_CACHE_HOME XDG_CONFIG_HOME XDG_DATA_HOME SSL_CERT_FILE SSL_CERT_DIR REQUESTS_CA_BUNDLE CURL_CA_BUNDLE "
        "http_proxy https_proxy ftp_proxy all_proxy no_proxy HTTP_PROXY HTTPS_PROXY FTP_PROXY ALL_PROXY NO_PROXY",
    )
)
_PREFIXES = (
    "MEPA_", "LC_", "PYTHON", "CONDA_", "MAMBA_", "LMOD_", "CUDA_", "NVIDIA_", "NCCL_", "GLOO_", "UCX_", "UCC_", "FI_",
    "OFI_", "IB_", "OMPI_", "PMIX_", "PMI_", "I_MPI_", "TORCH", "PYTORCH_", "TRITON_", "DS_", "OMP_", "KMP_", "GOMP_",
    "MKL_", "OPENBLAS_", "HF_", "HUGGINGFACE_", "WANDB_", "MLFLOW_", "APPTAINER", "SINGULARITY", "ENROOT_", "PYXIS_",
)  # fmt: skip
"""Settings of what runs in a job: its interpreter, its libraries, its network, its containers and trackers."""
_MENTIONED = re.compile(r"\$(?:(\w+)|\{(\w+)\})")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MOST_BYTES = 1 << 20
# SLURM separates variables by commas, and takes quotes away.
_NOT_IN_LIST = re.compile(r"[,'\"\\\x00-\x1f\x7f]")


def exported(
    own: Mapping[str, str], words: Iterable[str], profile: Profile, environment: Mapping[str, str] | None = None
) -> str:
    """The value of sbatch's `--export`: `own` variables with their values, and names of the environment's.

    Those are the names and prefixes above, what the profile's MEPA_EXPORT names, and what the profile, and the recipes
    and other small files among `words`, mention as $NAME. A variable that holds a secret (HF_TOKEN, WANDB_API_KEY) is
    among them only where MEPA_EXPORT names it.

    Raises:
        UserError: MEPA_EXPORT has a word that is no name, or a value of ours cannot be passed on.
    """
    environment = os.environ if environment is None else environment
    asked = profile.get("EXPORT").split()
    if wrong := [name for name in asked if not _NAME.fullmatch(name)]:
        raise UserError(f"{profile.path}: MEPA_EXPORT: {wrong[0]!r} is no variable's name; give names, with blanks")
    mentioned = _mentioned([str(profile.path), *words])
    names = [
        name
        for name in sorted(environment)
        if _NAME.fullmatch(name) and name not in own and (name in asked or _serves(name, mentioned))
    ]
    for name, value in own.items():
        if _NOT_IN_LIST.search(value):
            raise UserError(
                f"{name}={value!r}: SLURM's --export takes no commas, quotes, backslashes or control characters; "
                "choose another path"
            )
    return ",".join([*(f"{name}={value}" for name, value in own.items()), *names])


def _serves(name: str, mentioned: set[str]) -> bool:
    listed = name in _NAMES or name.startswith(_PREFIXES) or name in mentioned
    return listed and not is_secret_name(name)


def _mentioned(words: Iterable[str]) -> set[str]:
    """Variables that words, the files that they name, and the recipes that a manifest names, have in their paths."""
    found: set[str] = set()
    for word in words:
        text = _text_of(Path(word))
        recipes = {part for part in text.split() if part.endswith((".yaml", ".yml"))}
        for each in (word, text, *(_text_of(Path(recipe)) for recipe in recipes)):
            found |= {plain or braced for plain, braced in _MENTIONED.findall(each)}
    return found


def _text_of(path: Path) -> str:
    try:
        return read_file(path, _MOST_BYTES).decode(errors="replace")
    except (OSError, ValueError):
        return ""
