"""Exercise 13.1: the tokens that a state of an automaton allows, by a walk over a vocabulary's tree."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np

from labkit import notebook
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, expect
from labkit.exercises.common import PROMPTS, expect_same_answers, tiny_engine, whole
from labkit.models.load import LoadedModel
from labkit.sampling_params import SamplingParams, Structured
from labkit.structured.compiler import FormCompiler
from labkit.structured.form import CompiledForm
from labkit.structured.regex_dfa import ByteDFA, regex_dfa
from labkit.structured.token_dfa import TokenDFA


class Node:
    """A node of the tree: the bytes on the way to it are the beginning of some tokens.

    Attributes:
        children: The node behind each byte that goes on.
        tokens: The ids of the tokens that end here.
    """

    __slots__ = ("children", "tokens")

    def __init__(self) -> None:
        self.children: dict[int, Node] = {}
        self.tokens: list[int] = []


Allowed = Callable[[Node, np.ndarray, int], Iterable[int]]
Forced = Callable[[np.ndarray, np.ndarray, int], tuple[Iterable[int], Iterable[int]]]


def tree(tokens: Sequence[bytes], node: Callable[[], Node] = Node) -> Node:
    """The tree of a vocabulary. Tokens that write nothing, such as the end of an answer, are not in it."""
    root = node()
    for number, token in enumerate(tokens):
        at = root
        for byte in token:
            if byte not in at.children:
                at.children[byte] = node()
            at = at.children[byte]
        if token:
            at.tokens.append(number)
    return root


def allowed(root: Node, table: np.ndarray, state: int) -> list[int]:
    """The tokens whose bytes all lead on from this state."""
    found, waiting = [], [(root, state)]
    while waiting:
        node, here = waiting.pop()
        found += node.tokens
        for byte, child in node.children.items():
            if after := int(table[here, byte]):
                waiting.append((child, after))
    return found


# -- what is right --------------------------------------------------------------------------------

_SHAPE = "return the ids of the tokens: a list or a set of whole numbers"
_UNKNOWN = "return ids that the nodes hold (`node.tokens`)"
_BEGIN = "begin at `state`, where the answer stands, and not where answers begin"
_BRANCH = "leave a branch where it dies (state 0): all tokens behind it are refused at once"
_REFUSE = "a token is refused if any of its bytes leads to state 0"
_ALLOW = "a token is allowed if each of its bytes leads on, wherever that ends: others may complete the form"
_KEEP = "leave the tree and the table as they are"

Case = tuple[Sequence[bytes], str, bytes]


def _cases() -> Iterator[Case]:
    """Tokens, a form, and what is written of it: the smallest first."""
    yield (b"a", b"b"), "a", b""
    yield (b"a", b"b", b"ab", b"ba"), "ab", b""
    yield (b"a", b"b", b"ab", b"ba"), "ab", b"a"
    yield (b"a", b"b", b"ab", b"ba"), "ab", b"ab"
    yield (b"aa", b"aab", b"aabb"), "aa.*", b""
    yield (b"b", b"", b"a", b"b", b"ab", b"ab", b""), "b|ab", b""
    yield (b"a", b"aa", b"aaa", b"aaaa", b"b"), "a{1,3}", b""
    yield (b"a", b"aa", b"aaa", b"aaaa", b"b"), "a*b", b"aa"
    yield (b"n", b"no", b"not", b" no", b"yes", b"yet", b"ye", b"\0"), "yes|no|not now", b""
    yield (b"t", b"t now", b" now", b" n", b"now", b"not"), "yes|no|not now", b"no"
    yield ("ü".encode(), b"\xc3", b"\xbc", b"g", b"gr\xc3", "rü".encode(), b"r\xbc"), "grü|gra", b"g"
    yield (b"\0", b"\0a", b"a\0", b"a"), "\\x00a\\x00", b""
    rng = Random(13)
    forms = ("(ab|ba)*", "a(b|c)*a", "(a|b){3}c", "ab*c", "(abc)+", "c?b?a?", "a[bc]{2}|b[ac]")
    for _ in range(24):
        tokens = [bytes(rng.choices(b"abc", k=rng.randint(0, 4))) for _ in range(rng.randint(3, 14))]
        form = rng.choice(forms)
        yield tokens, form, rng.choice([b"", *_beginnings(regex_dfa(form, frozenset(range(256))))])


def _beginnings(dfa: ByteDFA) -> list[bytes]:
    """Some texts from which the form can be completed."""
    return [text for text in (b"a", b"ab", b"b", b"c", b"abc", b"ba") if state_after(dfa, text)]


def state_after(dfa: ByteDFA, text: bytes) -> int:
    """The state to which a text leads from the start."""
    state = dfa.start
    for byte in text:
        state = int(dfa.table[state, byte])
    return state


class _Watched(Node):
    """A node that notices when somebody asks what is behind it."""

    __slots__ = ("asked", "kept")

    def __init__(self) -> None:
        self.asked, self.kept, self.tokens = False, {}, []

    @property
    def children(self) -> dict[int, Node]:  # type: ignore[override]
        self.asked = True
        return self.kept


def _told(node: Any) -> Any:
    return node.tokens[:], {byte: _told(child) for byte, child in node.kept.items()}


def _opened_in_vain(node: Any, table: np.ndarray, state: int, path: bytes = b"") -> Iterator[bytes]:
    """The paths of nodes behind dead ones whose children were asked for."""
    for byte, child in node.kept.items():
        after = int(table[state, byte])
        if not state and child.asked and child.kept:
            yield path + bytes([byte])
        yield from _opened_in_vain(child, table, after, path + bytes([byte]))


def _examine(function: Callable[..., Any]) -> None:
    for tokens, form, written in _cases():
        dfa = regex_dfa(form, frozenset(range(256)))
        state = state_after(dfa, written)
        root: Any = tree(tokens, _Watched)
        _forget(root)
        before, table = _told(root), dfa.table.copy()
        right = set(allowed(tree(tokens), dfa.table, state))
        returned = function(root, table, state)
        names = "  ".join(f"{number} {str(token)[1:]}" for number, token in enumerate(tokens))
        told = f"tokens: {names}\nform: {form!r}, written so far: {written.decode()!r}\n"
        got = read_ids(returned, told)
        told += f"yours: {sorted(got)}\nright: {sorted(right)}"
        expect(_told(root) == before and bool((table == dfa.table).all()), _KEEP, told)
        expect(got <= {number for number, token in enumerate(tokens) if token}, _UNKNOWN, told)
        if got != right:
            first = set(allowed(tree(tokens), dfa.table, dfa.start))
            if got == first:
                raise Wrong(_BEGIN, told)
            wrong, rule = (got - right, _REFUSE) if got - right else (right - got, _ALLOW)
            raise Wrong(rule, f"{told}\nfor example {tokens[min(wrong)]!r}")
        vain = [path for path in _opened_in_vain(root, dfa.table, state) if path]
        expect(not vain, _BRANCH, f"{told}\nyou looked behind {vain[0] if vain else b''!r}")


def _forget(root: Any) -> None:
    root.asked = False
    for child in root.kept.values():
        _forget(child)


def read_ids(returned: Any, told: str = "") -> set[int]:
    """The ids that a learner's function returned. Raises `Wrong` if it returned something else."""
    if isinstance(returned, str | bytes | dict):
        raise Wrong(_SHAPE, f"{told}yours: {returned!r}")
    try:
        each = list(returned)
    except TypeError:
        raise Wrong(_SHAPE, f"{told}yours: {returned!r}") from None
    numbers = [None if isinstance(one, bool | np.bool_) else whole(one) for one in each]
    expect(None not in numbers, _SHAPE, f"{told}yours: {returned!r}")
    return {number for number in numbers if number is not None}


# -- in the engine --------------------------------------------------------------------------------


class OwnForms(FormCompiler):
    """Forms whose masks, or forced bytes, are made by functions of one's own.

    Args:
        model: the model.
        mask: the tokens that a state allows; None is the engine's own way.
        force: the bytes that must follow a state; None is the engine's own way.
    """

    def __init__(self, model: LoadedModel, mask: Allowed | None = None, force: Forced | None = None) -> None:
        super().__init__(model)
        self._mask, self._force = mask, force
        self._root: Node | None = None
        self._own: dict[Structured, CompiledForm] = {}

    def compile(self, asked: Structured) -> CompiledForm:
        """Return a form as `FormCompiler` does, with the functions in place of its own."""
        if asked not in self._own:
            form = super().compile(asked)
            if isinstance(form, TokenDFA):
                self._replace(form)
            self._own[asked] = form
        return self._own[asked]

    def _replace(self, form: TokenDFA) -> None:
        mask, force, dfa = self._mask, self._force, form.dfa
        if mask:
            root = self._root = self._root or tree(form.vocabulary.tokens)

            def masked(state: int) -> np.ndarray:
                row = np.zeros(len(form.vocabulary.tokens), bool)
                row[list(read_ids(mask(root, dfa.table, state)))] = True
                return row

            form.mask = lru_cache(512)(masked)
        if force:

            def forced_bytes(state: int) -> tuple[bytes, frozenset[int]]:
                text, follows = force(dfa.table, dfa.accepting, state)
                return bytes(map(int, text)), frozenset(map(int, follows))

            form.forced_bytes = forced_bytes  # type: ignore[method-assign]


FORMS = ("yes|no|not now", "[a-z]+( [a-z]+){2}", '\\{"age": [1-9][0-9]?, "name": "[A-Za-z ]{1,12}"\\}')


def answer(engine: Engine, own: OwnForms | None = None) -> Engine:
    """Answer a prompt in each form of this exercise, drawn at a high temperature."""
    if own:
        engine.forms = own
    for number, (prompt, form) in enumerate(zip(PROMPTS, FORMS, strict=True)):
        params = SamplingParams(max_tokens=40, temperature=1.5, seed=number, structured={"regex": form})
        engine.add_request(prompt, params)
    engine.run()
    return engine


def _run(function: Callable[..., Any]) -> Run:
    engines = [tiny_engine(num_blocks=64) for _ in range(2)]
    yours = answer(engines[0], OwnForms(engines[0].model, mask=function))
    expect_same_answers(yours, answer(engines[1]), "with your masks come the answers of the engine's own")
    counts = [count for record in yours.trace for row in record.rows for count in row.allowed]
    whole_ones = sum(
        bool(re.fullmatch(form, output.text))
        for form, output in zip(FORMS, yours.outputs.values(), strict=True)
        if output.finish_reason != "length"
    )
    cut = sum(output.finish_reason == "length" for output in yours.outputs.values())
    sentence = (
        f"Your masks chose among tokens {len(counts)} times, in {len(FORMS)} answers at temperature 1.5: the "
        f"engine's own answers, {whole_ones} of them in their form, {cut} cut off. The widest mask let "
        f"{max(counts):,} of {yours.model.module.vocab_size:,} tokens pass, the narrowest {min(counts)}."
    )
    last = [row.allowed for record in yours.trace for row in record.rows if row.request_id == "2"]
    flat = [count for counts in last for count in counts]
    picture = notebook.lines(
        list(range(1, len(flat) + 1)),
        {"allowed": flat},
        "Tokens that your mask allowed",
        x_name="place in the answer",
        y_name="tokens",
        digits=0,
        log="y",
    )
    return Run(sentence, [(f"An answer of the form {FORMS[2]}:", picture)])


MASK = Exercise("13.1", "the tokens that a state allows", allowed, _examine, _run)
