"""Parts of a model that keep their weights while the rest is trained, by patterns of names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from mepa_ds.errors import UserError

_OURS = "transformer."
_NEAREST = 3


def public_name(name: str) -> str:
    """A parameter of the objective under the name that exported weights have."""
    return name.removeprefix(_OURS)


def frozen_names(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """The names that a pattern of `optim.freeze` matches.

    Raises:
        UserError: a pattern matches none of them, or all are matched.
    """
    known = list(names)
    frozen: set[str] = set()
    for pattern in patterns:
        matched = {name for name in known if fnmatchcase(public_name(name), pattern)}
        if not matched:
            public = [public_name(name) for name in known]
            near = difflib.get_close_matches(pattern, public, n=_NEAREST, cutoff=0.0)
            raise UserError(
                f"optim.freeze: {pattern!r} freezes nothing; patterns are of whole names, such as {', '.join(near)}, "
                "with * for any part"
            )
        frozen |= matched
    if len(frozen) == len(known):
        raise UserError(f"optim.freeze: {list(patterns)} freezes everything; leave something to train")
    return frozen


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Marks the parameters that the patterns match, and makes their gradients zero.

    They stay parameters of the optimizer, with a rate of 0, so that checkpoints are those of any run, and what is
    frozen can be thawed from a checkpoint. Their gradients are still computed: frozen parts save no time.
    """
    frozen = frozen_names((name for name, _ in model.named_parameters()), patterns) if patterns else set()
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.is_frozen = True  # type: ignore[attr-defined]
            parameter.register_hook(_nothing)


def is_frozen(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "is_frozen", False)


def _nothing(gradient: Tensor) -> Tensor:
    return torch.zeros_like(gradient)
