"""How often generated digits show the class that was asked for, by a classifier trained on real digits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mepa_ds.data.images import images_once
from mepa_ds.generation.sampling import sample
from mepa_ds.models.transformer import NextScaleTransformer
from mepa_ds.tokenizer.tokenizer import Tokenizer

_BATCH = 100
_PER_CLASS, _SEED = 50, 1
SIDE = 8  # of scikit-learn's digits, which the shards hold upscaled


def digits_agreement(weights: Path, tokenizer: Path, train: Path, heldout: Path) -> dict[str, float]:
    """`class_agreement`: the share of generated digits (50 of each) that an SVC assigns to the class asked for;
    `svc_heldout_accuracy`: the same SVC's accuracy on real held-out digits, an upper bound for the agreement.
    """
    from sklearn.svm import SVC

    model, decoder = NextScaleTransformer.load(weights), Tokenizer.load(tokenizer)
    real, real_labels = _real(train, decoder.config.image_side)
    unseen, unseen_labels = _real(heldout, decoder.config.image_side)
    judge = SVC(gamma=0.001).fit(real, real_labels)
    asked = [label for label in range(model.config.num_classes) for _ in range(_PER_CLASS)]
    parts = []
    for first in tqdm(range(0, len(asked), _BATCH), "sampling", unit="batch", disable=None):
        parts.append(sample(model, decoder, asked[first : first + _BATCH], seed=_SEED, first_index=first))
    generated = torch.cat(parts)
    return {
        "class_agreement": float((judge.predict(_pixels(generated)) == np.array(asked)).mean()),
        "svc_heldout_accuracy": float((judge.predict(unseen) == unseen_labels).mean()),
    }


def _real(shards: Path, side: int) -> tuple[np.ndarray, np.ndarray]:
    batches = list(images_once(shards, batch_size=256, image_side=side))
    images = torch.cat([batch.images_B3HW for batch in batches]).add(1).mul(0.5)
    return _pixels(images), torch.cat([batch.labels_B for batch in batches]).numpy()


def _pixels(images_B3HW: Tensor) -> np.ndarray:
    """[0, 1] RGB -> (B, 64) grey values in 0..16, as in scikit-learn's data."""
    grey_B1HW = images_B3HW.mean(1, keepdim=True)
    return F.adaptive_avg_pool2d(grey_B1HW, SIDE).flatten(1).mul(16).numpy()
