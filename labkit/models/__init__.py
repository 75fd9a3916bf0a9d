"""Find, fetch, check and load a model. The story begins in `load.py`."""
