"""What stands beside a ViT's weights (config.json, preprocessor_config.json, names of directories), held against the
teacher before the weights are read: a mistake that no shape shows would make wrong features.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from mepa_ds.errors import UserError
from mepa_ds.teachers.known_vits import (
    MODEL_TYPES,
    TIMM_NAMES,
    Facts,
    differences,
    facts_of,
    facts_of_config,
    is_dino,
    nearest_teachers,
    settings_of,
    short_name,
)
from mepa_ds.weights.state_dict_files import CONFIG_NAME, read_json, settings_folder

PREPROCESSOR_NAME = "preprocessor_config.json"
_TIMM_WRAPPER = "timm_wrapper"
"""`model_type` of timm's models in the transformers library. Their names and settings are timm's."""
_CORPORA = ("lvd1689m", "sat493m")
"""What DINOv3 was trained on, as published names say it: images of the web, or satellites'."""
_TOLERANCE = 1e-3
"""Of means and standard deviations: those of the two corpora differ by 0.01 and more."""


def check_beside(path: Path, name: str, model_name: str) -> None:
    """Compares what is said beside the weights at `path` with the teacher `name`, which is timm's `model_name`.

    Raises:
        UserError: other sizes, another kind of model, another normalisation or another corpus; the message names the
            teacher that these weights are of.
    """
    folder, settings = settings_folder(path), settings_of(model_name)
    config = _read(folder, CONFIG_NAME)
    of_timm = config.get("pretrained_cfg")
    of_timm = of_timm if isinstance(of_timm, Mapping) else {}
    corpus = _corpus_in([*_names(path), config.get("_name_or_path"), of_timm.get("tag")])
    _check_config(config, path, name, model_name, corpus.name)
    if settings is not None and settings.tag in _CORPORA:
        _check_corpus(corpus, path, name, settings)
    if folder is None or settings is None:
        return
    preprocessor = _read(folder, PREPROCESSOR_NAME)
    if preprocessor.get("do_normalize") is not False:
        _check_normalisation(preprocessor, ("image_mean", "image_std"), folder / PREPROCESSOR_NAME, name, settings)
    _check_normalisation(of_timm, ("mean", "std"), folder / CONFIG_NAME, name, settings)


def check_facts(said: Facts, source: str, name: str, own: Mapping[str, Any] | None, corpus: str = "") -> None:
    """Raises UserError if what `source` says of the weights is not so of the teacher; None: it is no DINO.

    Args:
        corpus: the one of _CORPORA that the weights were trained on, if that is known.
    """
    if own is None:
        kind = said["model_type"]
        raise UserError(
            f"{source}: a {kind} of the transformers library, not {name}, of which timm's own file is read; "
            f"{_these_are(said, corpus)}"
        )
    if wrong := differences(said, own):
        told = ", ".join(f"{fact} {_short(theirs)} ({name}: {ours})" for fact, (theirs, ours) in wrong.items())
        raise UserError(f"{source}: not {name}, but {told}; {_these_are(said, corpus)}, or give weights of {name}")


def teachers_beside(path: Path) -> tuple[list[str], str]:
    """(the teachers that everything beside the weights in a directory fits, why there is none or "").

    Its config.json says that it is of one of MODEL_TYPES.
    """
    facts = facts_of_config(_read(path, CONFIG_NAME))
    found, wrong = nearest_teachers(facts)
    if wrong or not found:
        return [], _these_are(facts, "")
    fitting, reason = [], ""
    for name in found:
        try:
            check_beside(path, name, TIMM_NAMES[name])
            fitting.append(name)
        except UserError as error:
            reason = str(error)
    return fitting, "" if fitting else reason


def _these_are(said: Facts, corpus: str) -> str:
    teachers, wrong = nearest_teachers(said)
    teachers = [teacher for teacher in teachers if settings_of(TIMM_NAMES[teacher]).tag == corpus] or teachers
    if not wrong:
        return f"name the teacher {' or '.join(teachers)}" if teachers else "no teacher here is of that kind"
    told = ", ".join(f"{fact} {ours}" for fact, (_, ours) in wrong.items())
    return f"no teacher here is like that; nearest is {teachers[0]}, with {told}"


def _check_config(config: Mapping[str, Any], path: Path, name: str, model_name: str, corpus: str) -> None:
    kind, architecture = config.get("model_type"), config.get("architecture")
    source = f"{path}: {CONFIG_NAME}"
    if kind in MODEL_TYPES:
        check_facts(facts_of_config(config), f"{source} says", name, facts_of(model_name), corpus)
    elif kind is not None and kind != _TIMM_WRAPPER:
        raise UserError(
            f"{source} says that it holds {_short(kind)}, not {name}; of the transformers library's models, those of "
            f"type {', '.join(MODEL_TYPES)} are read, of others timm's own files. If this is timm's file of {name}, "
            "give it without this config.json"
        )
    elif isinstance(architecture, str):
        theirs, ours = (_without_bias(text.partition(".")[0]) for text in (architecture, model_name))
        if theirs != ours and (is_dino(theirs) or is_dino(ours)):
            raise UserError(
                f"{source} says that it holds timm's {_short(architecture)}, not {name}; name the teacher "
                f"{_short(short_name(architecture))}, or give weights of {name}"
            )


def _without_bias(architecture: str) -> str:
    """Weights with and without DINOv3's bias are told apart when they are read, by whether it is zero."""
    return architecture.removesuffix("_qkvb")


def _check_normalisation(
    said: Mapping[str, Any], keys: tuple[str, str], source: Path, name: str, settings: Any
) -> None:
    values = [said.get(key) for key in keys]
    for key, value, own in zip(keys, values, (settings.mean, settings.std), strict=True):
        if value is None or _near(value, own):
            continue
        fitting = [other for other, cfg in _siblings(settings) if all(map(_near, values, (cfg.mean, cfg.std)))]
        remedy = f"name the teacher {short_name(fitting[0])}" if fitting else "no teacher here is like that"
        raise UserError(
            f"{source}: says {key} {_short(value)}, but {name} takes images of {own}; {remedy}, or give weights of "
            f"{name}"
        )


class _Corpus(NamedTuple):
    name: str
    """One of _CORPORA, or empty: none is said."""
    said_by: str


def _corpus_in(names: Iterable[Any]) -> _Corpus:
    """The first name that says one of the corpora decides."""
    for said in names:
        found = [corpus for corpus in _CORPORA if isinstance(said, str) and corpus in said.lower()]
        if len(found) == 1:
            return _Corpus(found[0], said)
    return _Corpus("", "")


def _check_corpus(corpus: _Corpus, path: Path, name: str, settings: Any) -> None:
    if corpus.name in ("", settings.tag):
        return
    fitting = [other for other, cfg in _siblings(settings) if cfg.tag == corpus.name]
    right = short_name(fitting[0]) if fitting else " or ".join(n for n, m in TIMM_NAMES.items() if corpus.name in m)
    raise UserError(
        f"{path}: by the name {_short(corpus.said_by)} the weights were trained on {corpus.name}, but those of {name} "
        f"on {settings.tag}, whose images are normalised otherwise; name the teacher {right}, or give weights of {name}"
    )


def _siblings(settings: Any) -> Iterator[tuple[str, Any]]:
    """(timm's name with its tag, settings) of all weights that timm knows of the network."""
    import timm

    for model_name in timm.list_pretrained(f"{settings.architecture}.*"):
        yield model_name, settings_of(model_name)


def _names(path: Path) -> Iterator[str]:
    """Names that people and the Hub's cache give: of the file or directory, also of what it is a link to."""
    resolved = path
    with suppress(OSError, RuntimeError):  # links in a circle
        resolved = path.resolve()
    for place in (path, resolved):
        yield place.name
        folder = settings_folder(place)
        yield from [] if folder is None else [folder.name]
        yield from (part for part in reversed(place.parts) if part.startswith("models--"))


def _read(folder: Path | None, name: str) -> dict[str, Any]:
    return read_json(folder / name) if folder is not None and (folder / name).is_file() else {}


def _near(said: Any, own: Sequence[float]) -> bool:
    values = said if isinstance(said, list) else [said] * len(own)
    return len(values) == len(own) and all(
        isinstance(value, int | float) and math.isclose(value, right, abs_tol=_TOLERANCE, rel_tol=0)
        for value, right in zip(values, own, strict=True)
    )


def _short(value: Any) -> str:
    return value[:100] if isinstance(value, str) else str(value)[:100]
