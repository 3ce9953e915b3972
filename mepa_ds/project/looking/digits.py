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
    num_images=1498,
    fewest=145,
    most=153,
    singles=0,
    sides=(8, 8, 8),
    sizes={"1-16": 1498},
    num_opened=1498,
    colour="grey",
)
"""Known without a look: they never change (a test looks)."""
