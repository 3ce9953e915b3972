"""Mixture of experts: a router, a dispatcher and experts, side by side."""
