"""Runs as they go on: what their files say at this moment, as text in a terminal."""
