"""From what a request asks for to the form of its answers: which backend, compiled once."""

from __future__ import annotations

import re
from functools import cached_property, lru_cache

from labkit.models.load import LoadedModel
from labkit.models.no_tokenizer import NoTokenizer
from labkit.sampling_params import Structured
from labkit.structured.form import AnswerForm, CompiledForm
from labkit.structured.guidance import Guidance
from labkit.structured.token_dfa import TokenDFA
from labkit.structured.vocabulary import Vocabulary

_MOST_FORMS = 16  # that are kept compiled


class FormCompiler:
    """Compiles forms for a model. Any thread may call it.

    A choice and a regular expression become an automaton of our own, JSON and grammars go to the library.

    Args:
        model: the model.
        jump_ahead: whether tokens that a form forces are computed without a choice, several in a step.
    """

    def __init__(self, model: LoadedModel, *, jump_ahead: bool = True) -> None:
        self._model, self._jump_ahead = model, jump_ahead
        self.compile = lru_cache(_MOST_FORMS)(self._compile)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The model's tokens."""
        if isinstance(self._model.tokenizer, NoTokenizer):
            raise ValueError("structured needs text, and the model has no tokenizer")
        ends = self._model.eos_token_ids
        return Vocabulary(self._model.tokenizer, self._model.module.vocab_size, ends)

    @cached_property
    def _guidance(self) -> Guidance:
        return Guidance(self.vocabulary, self._model.eos_token_ids)

    def start(self, asked: Structured, stop_ids: frozenset[int], max_tokens: int) -> AnswerForm:
        """Return the form of a new answer.

        Args:
            asked: what the request asks for.
            stop_ids: the tokens that end the answer.
            max_tokens: the most tokens that it may have.

        Raises:
            ValueError: for a form that is not supported, that no answer has, or only the empty one, or that
                needs more tokens; the message names the part.
        """
        form = self.compile(asked)
        if form.fewest_tokens > max_tokens:
            raise ValueError(
                f"max_tokens must be at least {form.fewest_tokens} for this form: no shorter answer has it, "
                f"and {max_tokens} is the limit"
            )
        matcher = form.start()
        if matcher.is_over:
            raise ValueError(f"structured: {asked.kind}: only the empty answer has this form")
        return AnswerForm(matcher, stop_ids, jump_ahead=self._jump_ahead)

    def _compile(self, asked: Structured) -> CompiledForm:
        if asked.kind == "choice":
            return TokenDFA("|".join(map(re.escape, asked.value)), self.vocabulary)
        text = str(asked.value)
        if asked.kind == "regex":
            return TokenDFA(text, self.vocabulary)
        return self._guidance.compile(asked.kind, text)
