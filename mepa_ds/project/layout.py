"""Where the files of a project are, relative to its directory."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mepa_ds.project.choosing.choices import PUBLISHED_TOKENIZER, Choices
from mepa_ds.project.looking.facts import ImageFacts

DINO_FILE = Path("weights/dinov2_vitb14_pretrain.pth")
TOKENIZER_FILE = Path(f"weights/{PUBLISHED_TOKENIZER}.pth")


@dataclass(frozen=True)
class Layout:
    """The two folders and the two recipes; everything else follows."""

    data: Path = Path("data")
    runs: Path = Path("runs")
    tokenizer_recipe: Path = Path("tokenizer.yaml")
    recipe: Path = Path("pretrain.yaml")

    def train(self, images: ImageFacts) -> Path:
        """The set of training images."""
        return Path(images.train_words[0]) if images.kind == "ready_shards" else self.data / "train"

    def heldout(self, images: ImageFacts) -> Path:
        return Path(images.heldout_words[0]) if images.kind == "ready_shards" else self.data / "heldout"

    def tokens(self, split: str, chosen: Choices) -> Path:
        return self.data / f"{split}.tokens-{PUBLISHED_TOKENIZER if chosen.is_published else 'tokenizer'}"

    def features(self, chosen: Choices) -> Path:
        return self.data / f"train.features-{chosen.teacher}"

    def tokenizer(self, chosen: Choices) -> Path:
        return TOKENIZER_FILE if chosen.is_published else self.runs / "tokenizer"

    @property
    def pretrain(self) -> Path:
        return self.runs / "pretrain"

    def weights(self, chosen: Choices) -> Path:
        """Of the model that samples are drawn from: without held-out images none is the best."""
        return self.pretrain / ("last" if chosen.heldout == "none" else "best")

    @property
    def classifier(self) -> Path:
        return self.runs / "classifier"

    @property
    def scores(self) -> Path:
        return self.runs / "scores.json"

    @property
    def grid(self) -> Path:
        """The picture of samples."""
        return self.runs / "samples.png"

    @property
    def samples(self) -> Path:
        """A folder of samples, one file each."""
        return self.runs / "samples"

    @property
    def report(self) -> Path:
        return self.runs / "report.json"

    @property
    def progress(self) -> Path:
        return self.runs / "progress.json"
