"""Tests that `make test` leaves out: they take long, and see what shorter ones see too, in more settings."""

from __future__ import annotations

import os

import pytest

FULL = os.environ.get("MEPA_FULL_TESTS") == "1"
slow = pytest.mark.skipif(not FULL, reason="slow: MEPA_FULL_TESTS=1 runs it")
