"""Structured output: an answer that has a form, by a mask over the vocabulary at each of its places."""
