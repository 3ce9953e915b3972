"""Tests that `make test` leaves out: they take long, and see what shorter ones see too, in more settings.

They are marked `slow`; where the same test does more on request, it asks here.
"""

from __future__ import annotations

import os

FULL = os.environ.get("MEPA_FULL_TESTS") == "1"
