"""Measurements that anyone can repeat with `python -m labkit.benchmark`."""
