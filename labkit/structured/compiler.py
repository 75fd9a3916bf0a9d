"""From what a request asks for to the form of its answers: which backend, compiled once."""

from __future__ import annotations

import re
import threading
from functools import cached_property

from labkit.models.load import LoadedModel
from labkit.models.no_tokenizer import NoTokenizer
from labkit.sampling_params import Structured
from labkit.structured.form import AnswerForm, CompiledForm
from labkit.structured.guidance import Guidance
from labkit.structured.token_dfa import TokenDFA
from labkit.structured.vocabulary import Vocabulary

_MOST_FORMS = 16  # that are kept compiled


class FormCompiler:
    """Compiles forms for a model, each once. Any thread may call it; a second one waits for the first.

    A choice and a regular expression become an automaton of our own, JSON and grammars go to the library.

    Args:
        model: the model.
    """

    def __init__(self, model: LoadedModel) -> None:
        self._model, self._lock = model, threading.RLock()
        self._forms: dict[Structured, CompiledForm] = {}  # the latest last

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        if isinstance(self._model.tokenizer, NoTokenizer):
            raise ValueError("structured needs text, and the model has no tokenizer")
        ends = self._model.eos_token_ids
        return Vocabulary(self._model.tokenizer, self._model.module.vocab_size, ends)

    @cached_property
    def _guidance(self) -> Guidance:
        return Guidance(self._vocabulary)

    def compile(self, asked: Structured) -> CompiledForm:
        """Return a form for the model's vocabulary. Raises as `start` does."""
        with self._lock:
            form = self._forms.pop(asked, None) or self._compile(asked)
            self._forms[asked] = form
            if len(self._forms) > _MOST_FORMS:
                del self._forms[next(iter(self._forms))]
            return form

    def start(self, asked: Structured, stop_ids: frozenset[int], max_tokens: int) -> AnswerForm:
        """Return the form of a new answer.

        Args:
            asked: what the request asks for.
            stop_ids: the tokens that end the answer. Those that write nothing are allowed where the form is
                complete, any other where the form allows its text.
            max_tokens: the most tokens that it may have.

        Raises:
            ValueError: for a form that is not supported, that no answer has, or only the empty one, or that
                is known to need more tokens; the message names the part.
        """
        form = self.compile(asked)
        tokens = self._vocabulary.tokens
        silent = frozenset(token for token in stop_ids if not tokens[token])
        answer = AnswerForm(form.start(), len(tokens), silent)
        fewest = max(form.fewest_tokens, len(answer.forced))
        if fewest > max_tokens:
            raise ValueError(
                f"max_tokens must be at least {fewest} for this form: no shorter answer has it, "
                f"and {max_tokens} is the limit"
            )
        return answer

    def _compile(self, asked: Structured) -> CompiledForm:
        form = self._backend(asked)
        first = form.start()
        try:
            something = first.mask().any()
        except ValueError as error:  # nothing can begin it, or it is too large
            why = str(error).removeprefix("structured: ")
            raise ValueError(f"structured: {asked.kind}: no answer can begin: {why}") from None
        if first.may_end and not something:
            raise ValueError(f"structured: {asked.kind}: only the empty answer has this form")
        return form

    def _backend(self, asked: Structured) -> CompiledForm:
        if asked.kind == "choice":
            return TokenDFA("|".join(map(re.escape, asked.value)), self._vocabulary)
        text = str(asked.value)
        if asked.kind == "regex":
            return TokenDFA(text, self._vocabulary)
        return self._guidance.compile(asked.kind, text)
