"""torch.compile of the blocks: whether it is wanted, whether it works here, and how it is done."""

from __future__ import annotations

import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch

from mepa_ds import distributed, log
from mepa_ds.errors import UserError
from mepa_ds.models.block import Block
from mepa_ds.models.moe.layer import MoEFeedForward
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.safety.compilers import keep_compiled_code_private

_SHOWN = 200


def compiles(wanted: bool | None, recompute: Literal["none", "selective", "blocks"], device: torch.device) -> bool:
    """Returns whether blocks are to be compiled, by `parallel.compile`. Collective.

    None stands for "on a GPU, unless activations are recomputed". Then a machine without a working compiler costs speed
    alone, and a line says so.

    Raises:
        UserError: on every rank, when compilation is demanded and does not work on one of them.
    """
    if not (wanted if wanted is not None else device.type == "cuda" and recompute == "none"):
        return False
    troubles = distributed.of_all(trouble_with_compiler(device))
    rank, trouble = next(((rank, text) for rank, text in enumerate(troubles) if text is not None), (0, None))
    if trouble is None:
        return True
    line = f"parallel.compile: torch.compile does not work on rank {rank} ({trouble})"
    if wanted:
        raise UserError(f"{line}; install a C++ compiler, for a GPU also Triton, or set it to null", agreed=True)
    if distributed.is_main():
        log.note(f"{line}: the blocks run uncompiled, which is slower")
    return False


def trouble_with_compiler(device: torch.device) -> str | None:
    """Compiles a small function for the device, with its backward pass; returns the reason where that fails."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x).sum()

    x = torch.ones(32, device=device, requires_grad=True)
    chatty = [logging.getLogger(name) for name in ("torch._inductor", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in chatty]
    try:
        for logger in chatty:
            logger.setLevel(logging.CRITICAL)
        keep_compiled_code_private()
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            torch.compile(function)(x).backward()
    except Exception as error:  # of Dynamo, Inductor, Triton, a compiler, a library that it cannot load
        words = str(error).partition("Set TORCHDYNAMO_VERBOSE")[0].split()
        return f"{type(error).__name__}: {' '.join(words)[:_SHOWN]}"
    finally:
        for logger, level in zip(chatty, levels, strict=True):
            logger.setLevel(level)
    return None


def compile_blocks(transformer: NextScaleTransformer) -> None:
    """Compiles the blocks in place, so that parameters keep their names.

    Dispatchers are not compiled, and so cut a block's graph in two: the number of rows of an expert changes with every
    batch, and rows travel between ranks.
    """
    keep_compiled_code_private()
    for block in transformer.blocks:
        ffn = cast(Block, block).ffn
        if isinstance(ffn, MoEFeedForward):
            ffn.dispatcher = torch.compiler.disable(ffn.dispatcher)
        block.compile()


def uncompiled(compiled: bool) -> AbstractContextManager[object]:
    """A context in which compiled blocks run eagerly. PyTorch imports its compiler for that: only if there are any."""
    return torch.compiler.set_stance("force_eager") if compiled else nullcontext()
