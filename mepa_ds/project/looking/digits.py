"""scikit-learn's handwritten digits, which come with a package and never change."""

from __future__ import annotations

from mepa_ds.project.looking.facts import ImageFacts

DIGITS = "digits"
"""In place of a folder: scikit-learn's."""
DIGITS_FACTS = ImageFacts(
    source="scikit-learn's handwritten digits",
    kind="digits",
    train_words=(DIGITS, "--split", "train"),
    heldout_words=(DIGITS, "--split", "heldout"),
    classes=tuple("0123456789"),
    counts=(148, 152, 147, 153, 151, 152, 151, 149, 145, 150),
    sides=(8, 8, 8),
    sizes={"1-16": 1498},
    num_opened=1498,
    colour="grey",
)
"""Known without a look: they never change (a test looks)."""
