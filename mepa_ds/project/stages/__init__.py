"""Stages of commands that are run one after another, once each, and continued after a stop."""
