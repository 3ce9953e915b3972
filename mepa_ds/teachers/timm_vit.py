"""DINOv2, DINOv3 and any other plain ViT of timm as a teacher: patch tokens after the final norm.

Shape legend: B batch, H image height, W image width, N patches (row-major), C width of the ViT.

A 256-pixel image on a 16x16 grid enters at 224 px with patch 14 (DINOv2) and at 256 px with patch 16 (DINOv3), as
REPA and MEPA do. Position embeddings are resampled to the grid by timm.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mepa_ds import distributed
from mepa_ds.errors import UserError
from mepa_ds.teachers import transformers_layout
from mepa_ds.teachers.base import Teacher
from mepa_ds.teachers.beside_weights import check_beside, check_facts
from mepa_ds.teachers.known_vits import facts_of_model, is_dino, settings_of
from mepa_ds.weights.directories import load_strict
from mepa_ds.weights.state_dict_files import read_with_rest
from mepa_ds.weights.state_dicts import Wanted, listed

HUB = "hub"
"""Given in place of a weights path: let timm resolve the model's name and download it."""
DEFAULT_GRID_SIDE = 16


class TimmVit(Teacher):
    """Wraps a timm ViT built with `dynamic_img_size=True`."""

    mean_311: Tensor
    std_311: Tensor

    def __init__(self, name: str, model: Any, grid_side: int):
        super().__init__(name, model.num_features, grid_side, model.patch_embed.patch_size[0])
        self.model: Any = model
        settings = model.pretrained_cfg
        # Not persistent: the identity is the hash of the weights alone.
        for key in ("mean", "std"):
            self.register_buffer(f"{key}_311", torch.tensor(settings[key]).view(3, 1, 1), persistent=False)

    @classmethod
    def load(cls, name: str, model_name: str, weights: str | Path | None, grid_side: int | None) -> TimmVit:
        """Builds timm's `model_name` with weights from a local file or directory, or from the hub when asked.

        Local weights may be timm's own, the authors' original file (DINOv2's and DINOv3's .pth are converted), or
        DINOv2 or DINOv3 as the transformers library stores them. Raises UserError for weights that are missing,
        unreadable or of another model, and for a model that is no plain ViT.
        """
        if weights is None:
            raise UserError(
                f"teacher {name!r} needs weights: give the path of a local checkpoint (.pth, .safetensors or a "
                f"directory from the Hub) of timm's {model_name}, or {HUB!r} to let timm download it"
            )
        if str(weights) != HUB:
            check_beside(Path(weights), name, model_name)
        model = _create(model_name, pretrained=str(weights) == HUB)
        if str(weights) != HUB:
            load_weights(model, name, model_name, Path(weights))
        return cls(name, model, grid_side or DEFAULT_GRID_SIDE).freeze()

    @classmethod
    def outline(cls, name: str, model_name: str) -> TimmVit:
        """The teacher without weights, on the meta device. Raises UserError for a model that is no plain ViT."""
        with torch.device("meta"):
            return cls(name, _create(model_name, pretrained=False), DEFAULT_GRID_SIDE)

    @property
    def has_cls(self) -> bool:
        return getattr(self.model, "cls_token", None) is not None

    def _features(self, images_B3HW: Tensor) -> tuple[Tensor, Tensor | None]:
        tokens = self.model.forward_features(((images_B3HW + 1) / 2 - self.mean_311) / self.std_311)
        if isinstance(self.model.norm, nn.Identity):  # ViTs that pool by mean keep their final norm behind the pooling
            tokens = self.model.fc_norm(tokens)
        return tokens[:, self.model.num_prefix_tokens :], tokens[:, 0] if self.has_cls else None


def _create(model_name: str, pretrained: bool) -> Any:
    import timm

    settings_of(model_name)  # raises for a tag that is none
    try:
        model = timm.create_model(model_name, pretrained=pretrained, num_classes=0, dynamic_img_size=True)
    except TypeError as error:  # the constructor takes no dynamic_img_size
        raise UserError(f"timm's {model_name} is not a plain ViT with an adjustable input size ({error})") from error
    except (OSError, RuntimeError, ValueError) as error:
        if not pretrained:
            raise
        raise UserError(
            f"timm could not fetch {model_name} from the hub ({error}); give a local checkpoint instead"
        ) from error
    if not hasattr(model, "num_prefix_tokens"):
        raise UserError(f"timm's {model_name} is a {type(model).__name__}, not a plain ViT")
    return model


def load_weights(model: Any, name: str, model_name: str, path: Path) -> None:
    """Reads a local file or directory into timm's `model_name`, which is the teacher `name`. Raises UserError."""
    # Names that the authors' files and timm's have in common, and those of the transformers library.
    names = ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
    wanted = Wanted(f"a ViT such as timm's {model_name}", names, transformers_layout.WANTED_NAMES)
    state, rest = read_with_rest(path, wanted)
    if transformers_layout.is_theirs(state):
        layout = transformers_layout.layout_of(state, str(path))
        facts = transformers_layout.facts_of_weights(state, layout, str(path))
        own = facts_of_model(model, model_name) if is_dino(model_name) else None
        check_facts(facts, f"{path}: the weights are", name, own)
        state = transformers_layout.to_authors(state, layout, str(path))
        if rest:
            distributed.note_once(f"{path}: left out {listed(rest)}, which are no part of the teacher")
    _check_qkv_bias(state, model, model_name, path)
    # timm keeps each architecture's conversion of original checkpoints beside the architecture.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        try:
            state = convert(state, model)
        except (KeyError, IndexError, RuntimeError, AttributeError, TypeError, ValueError, AssertionError) as error:
            raise UserError(f"{path}: these are not weights of timm's {model_name} ({error})") from error
    classifiers = model.pretrained_cfg.get("classifier") or ()
    heads = tuple(f"{head}." for head in ([classifiers] if isinstance(classifiers, str) else classifiers))
    load_strict(model, {name: tensor for name, tensor in state.items() if not name.startswith(heads)}, str(path))


def _check_qkv_bias(state: dict[str, Tensor], model: nn.Module, model_name: str, path: Path) -> None:
    """Refuses a bias that timm would silently leave out, and drops one that is zero, which timm would reject."""
    if "storage_tokens" not in state or _has_qkv_bias(model):
        return
    # DINOv3's original files have a qkv bias that is zero in most models; timm leaves it out of those.
    for name in [name for name in state if name.endswith("attn.qkv.bias")]:
        mask = state.get(f"{name}_mask")
        if (state[name] * (1 if mask is None else mask.nan_to_num(0))).any():
            architecture, dot, tag = model_name.partition(".")
            raise UserError(f"{path}: these weights have a qkv bias; use the teacher {architecture}_qkvb{dot}{tag}")
        del state[name]


def _has_qkv_bias(model: nn.Module) -> bool:
    return any(name.endswith("q_bias") for name, _ in model.named_parameters())
