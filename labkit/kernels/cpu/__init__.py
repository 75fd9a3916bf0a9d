"""Faster decoder layers on a CPU: one file of C++, compiled once, and what uses it."""
