"""Measurements that anyone can repeat: `python -m labkit.benchmark`."""
