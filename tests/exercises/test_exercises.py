"""The framework of exercises: what a learner is told of an answer that is open, wrong, endless or right."""

from __future__ import annotations

import functools
import multiprocessing
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell

from labkit import exercises
from labkit.config import EngineConfig
from labkit.core.block_pool import InvariantError
from labkit.engine import Engine
from labkit.exercises import Exercise, Run, Wrong, check, expect, judge
from labkit.sampling_params import SamplingParams
from labkit.views.picture import Picture, bars
from tests.exercising import assert_accepted, assert_open, assert_refused, boxes, folded, function_from

UNTIL = "Until it is right, the cells below use the reference."


def pages(tokens: int, size: int) -> int:
    return -(-tokens // size)


def examine(fn: Callable[[int, int], int]) -> None:
    for tokens, size in ((0, 4), (4, 4), (5, 4)):
        got, right = fn(tokens, size), pages(tokens, size)
        expect(
            got == right, "a page that is begun is a whole page", f"{tokens} tokens: {got} pages, not {right}"
        )


def in_engine(fn: Callable[[int, int], int]) -> Run:
    return Run("Yours: 2 pages, reference 2.", [("Pages", bars({"yours": fn(5, 4)}, "Pages"))])


@pytest.fixture(autouse=True)
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two exercises of a made-up notebook 98."""
    module = ModuleType("labkit.exercises.e98")
    module.EXERCISES = (
        Exercise("98.1", "Count pages", pages, examine, in_engine),
        Exercise("98.2", "Count pages, without an engine", pages, examine),
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    yield


def with_run(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Run]) -> None:
    """Another run for exercise 98.1."""
    there = (Exercise("98.1", "Count pages", pages, examine, run),)
    monkeypatch.setattr(sys.modules["labkit.exercises.e98"], "EXERCISES", there)


# -- open, wrong, right ---------------------------------------------------------------------------


def test_an_untouched_stub_is_open_and_says_so_in_one_fixed_line(capsys: pytest.CaptureFixture[str]) -> None:
    stub = function_from('def stub(tokens, size):\n    """Pages."""\n    raise NotImplementedError\n', "stub")
    assert_open("98.1", stub)
    assert check("98.1", stub) is pages
    assert capsys.readouterr().out == (
        "○ 98.1 Count pages: yours to write. Until then the reference is used.\n"
    )


def test_a_wrong_answer_is_told_the_rule_and_the_smallest_example(capsys: pytest.CaptureFixture[str]) -> None:
    assert check("98.1", lambda tokens, size: tokens // size) is pages
    assert capsys.readouterr().out == (
        "✗ 98.1 Count pages: a page that is begun is a whole page\n  5 tokens: 1 pages, not 2\n  "
        + UNTIL
        + "\n"
    )


def test_a_right_answer_is_run_drawn_and_returned(capsys: pytest.CaptureFixture[str]) -> None:
    def mine(tokens: int, size: int) -> int:
        return (tokens + size - 1) // size

    verdict = assert_accepted("98.1", mine)
    assert [caption for caption, _ in verdict.pictures] == ["Pages"]
    assert check("98.1", mine) is mine
    out = capsys.readouterr().out
    assert out.startswith("✓ 98.1 Count pages. Yours: 2 pages, reference 2.\n\nPages\nPages\n\nyours  ██")
    assert check("98.2", mine) is mine
    assert capsys.readouterr().out == "✓ 98.2 Count pages, without an engine.\n"


def test_a_long_line_is_broken_between_words(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_run(monkeypatch, lambda fn: Run(" ".join(["word"] * 60)))
    check("98.1", lambda tokens, size: -(-tokens // size))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and max(map(len, lines)) <= 110
    assert lines[1].startswith("  word ") and " ".join(lines).split().count("word") == 60


def test_an_example_of_several_lines_is_set_apart() -> None:
    assert str(Wrong("the rule", "in: 1\nout: 2")) == "the rule\n  in: 1\n  out: 2"
    assert str(Wrong("the rule")) == "the rule"


def test_the_name_that_check_gave_back_is_not_praised_as_the_learners_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check("98.1", pages) is pages
    assert capsys.readouterr().out == (
        "○ 98.1 Count pages: this is the reference. Run the cell with your own code again.\n"
    )


def test_a_rule_that_the_engine_finds_broken_is_told_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(fn: Callable[..., int]) -> Run:
        raise InvariantError("page 3 has two owners")

    with_run(monkeypatch, run)
    assert_refused("98.1", lambda tokens, size: -(-tokens // size), "Count pages: page 3 has two owners\n")


# -- exceptions -----------------------------------------------------------------------------------

RAISES = """\
def broken(tokens, size):
    table = []
    return table[tokens]
"""
HELPED = """\
def helper(tokens):
    return 1 / tokens

def broken(tokens, size):
    return helper(tokens)
"""
METHOD = """\
class Broken:
    def __init__(self, tokens, size):
        self.tokens = tokens

    def __eq__(self, other):
        return self.tokens.missing
"""
PROPERTY = """\
class Broken:
    def __new__(cls, tokens, size):
        return super().__new__(cls).first

    @property
    def first(self):
        return {}["first"]
"""


@pytest.mark.parametrize(
    ("code", "name", "said"),
    [
        (
            RAISES,
            "broken",
            "it raised IndexError: list index out of range\n  in line 3: return table[tokens]",
        ),
        (HELPED, "broken", "it raised ZeroDivisionError: division by zero\n  in line 2: return 1 / tokens"),
        (METHOD, "Broken", "no attribute 'missing'\n  in line 6: return self.tokens.missing"),
        (PROPERTY, "Broken", "it raised KeyError: 'first'\n  in line 7: return {}[\"first\"]"),
        (
            "def broken(tokens, size):\n    assert tokens\n",
            "broken",
            "AssertionError\n  in line 2: assert tokens\n",
        ),
    ],
)
def test_an_exception_is_named_with_its_line_in_the_learners_code(code: str, name: str, said: str) -> None:
    assert_refused("98.1", function_from(code, name), said)


def test_a_wrapped_or_partial_function_is_looked_through() -> None:
    broken = function_from(RAISES, "broken")
    assert_refused("98.1", functools.partial(broken), "in line 3: return table[tokens]")
    assert_refused("98.1", functools.cache(broken), "in line 3: return table[tokens]")


def test_the_line_named_is_the_learners_own_and_not_one_of_the_library_it_called() -> None:
    code = "import json\n\ndef broken(tokens, size):\n    return json.loads('{')\n"
    verdict = assert_refused("98.1", function_from(code, "broken"), "in line 4: return json.loads('{')")
    assert verdict.text.count("in line") == 1


def test_a_long_exception_is_cut() -> None:
    code = "def broken(tokens, size):\n    raise ValueError('\\n'.join('abcdefgh'))\n"
    verdict = assert_refused("98.1", function_from(code, "broken"), "ValueError: a\n  b\n  c\n  in line 2")
    assert "\n  d" not in verdict.text


def test_a_function_that_takes_other_arguments_is_told_so() -> None:
    one = function_from("def one(tokens):\n    return tokens\n", "one")
    said = "it cannot be called as the exercise calls it\n  TypeError: one() takes 1 positional"
    assert_refused("98.1", one, said)


def test_what_breaks_outside_the_learners_code_is_not_said_to_be_raised_by_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def run(fn: Callable[..., int]) -> Run:
        raise KeyError(7)

    with_run(monkeypatch, run)
    right = function_from("def right(tokens, size):\n    return -(-tokens // size)\n", "right")
    assert_refused("98.1", right, "the engine cannot go on with what it returned or did\n  KeyError: 7")


def test_not_implemented_by_something_else_is_not_a_stub() -> None:
    code = "def broken(tokens, size):\n    return helper(tokens)\n"
    broken = function_from(code, "broken")
    helper = function_from("def helper(tokens):\n    raise NotImplementedError('for Half')\n", "helper")
    broken.__globals__["helper"] = helper
    assert_refused(
        "98.1", broken, "it raised NotImplementedError: for Half\n  in line 2: return helper(tokens)"
    )


STUBS = """\
class Mine:
    def __init__(self, *_): ...
    def __eq__(self, other): raise NotImplementedError
"""


def test_a_class_whose_method_is_a_stub_is_open() -> None:
    assert_open("98.1", function_from(STUBS, "Mine"))


# -- patience -------------------------------------------------------------------------------------

ENDLESS = """\
def endless(tokens, size):
    count = 0
    while True:
        try:
            count += 1
        except Exception:
            pass
"""


@pytest.fixture(params=["child", "here"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Examines in a child process, where the system has that, and in this one."""
    if request.param == "here":
        monkeypatch.setattr(exercises, "can_fork", lambda: False)
    elif sys.platform != "linux":
        pytest.skip("no child processes here")
    return request.param


def test_an_endless_loop_is_stopped_and_named_though_it_catches_exceptions(either_way: str) -> None:
    verdict = judge("98.1", function_from(ENDLESS, "endless"), patience=0.2)
    assert verdict.state == "wrong"
    said = "it had not returned after 0.2 seconds of computing: is there a loop that never ends?\n  in line "
    assert verdict.text.startswith(f"✗ 98.1 Count pages: {said}") and verdict.text.endswith(UNTIL)
    assert any(line in verdict.text for line in ("while True:", "try:", "count += 1")), verdict.text


def test_an_endless_loop_inside_the_engine_is_stopped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine survives an exception in a step, but it must not survive this one."""
    engine = Engine(EngineConfig(model="tiny-random", num_blocks=16, block_size=4))
    engine.add_request("a", SamplingParams(max_tokens=2))

    def run(fn: Callable[..., int]) -> Run:
        engine.runner.run = lambda plan: fn(-1, 1)
        engine.step()
        return Run("it came to an end")

    def endless(tokens: int, size: int) -> int:
        while tokens < 0:
            time.sleep(0.001)  # computes nothing, but takes time
        return -(-tokens // size)

    with_run(monkeypatch, run)
    verdict = judge("98.1", endless, patience=0.05)
    assert verdict.state == "wrong" and "had not returned after 0.3 seconds" in verdict.text


def test_a_machine_that_is_busy_with_other_things_is_not_held_against_the_learner(either_way: str) -> None:
    def slow(tokens: int, size: int) -> int:
        time.sleep(0.4)
        return -(-tokens // size)

    began = time.perf_counter()
    assert judge("98.1", slow, patience=0.4).state == "right"
    assert time.perf_counter() - began > 1.2


def test_nothing_is_left_running_afterwards(either_way: str) -> None:
    before = threading.active_count()
    for function in (pages, lambda *_: 7, function_from(ENDLESS, "endless")):
        judge("98.1", function, patience=0.1)
        assert threading.active_count() == before and not multiprocessing.active_children()


def test_a_thread_judges_as_well(either_way: str) -> None:
    found: list[str] = []

    def ask() -> None:
        found.append(judge("98.1", lambda t, s: -(-t // s)).state)
        found.append(judge("98.1", function_from(ENDLESS, "endless"), patience=0.1).state)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert found == ["right", "wrong"]


def test_what_takes_long_is_said_and_wiped_out(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exercises, "_QUIET", 0.0)
    check("98.1", lambda tokens, size: time.sleep(0.4) or -(-tokens // size))
    shown = capsys.readouterr().out
    assert "\r... 98.1 Count pages: its rules, case by case (" in shown
    head, _, tail = shown.rpartition("\r")
    assert head.endswith(" " * 20) and tail.startswith("✓ 98.1 Count pages.")


# -- what may not bring the notebook down -----------------------------------------------------------

DOWN = {  # code of a function, and what is said of it
    "raise SystemExit": "it calls exit(): return an answer instead\n  in line 2: raise SystemExit",
    "return 'x' * 1_000_000": " 0 tokens: xxxxxxxxxx",
    "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})": "Odd: (an exception that cannot",
}


@pytest.mark.parametrize("code", DOWN)
def test_a_verdict_is_short_whatever_a_function_does(code: str, either_way: str) -> None:
    verdict = assert_refused(
        "98.1", function_from(f"def odd(tokens, size):\n    {code}\n", "odd"), DOWN[code]
    )
    assert len(verdict.text) < 2500


IN_C = {  # what nothing within the process can stop, and what is said of it
    "return sum(iter(int, 1))": "is there a loop that never ends?\n  in line 2: return sum(iter(int, 1))",
    "import os; os._exit(3)": "it ended its process with code 3: return an answer instead",
    "import ctypes; ctypes.string_at(0)": "it ended its process with signal SIGSEGV",
    "return [1] * 2**29": "it raised MemoryError\n  in line 2: return [1] * 2**29",
}


@pytest.mark.skipif(sys.platform != "linux", reason="no child processes here")
@pytest.mark.parametrize("code", IN_C)
def test_a_child_process_takes_the_blow(code: str) -> None:
    odd = function_from(f"def odd(tokens, size):\n    {code}\n", "odd")
    verdict = judge("98.1", odd, patience=0.5)
    assert verdict.state == "wrong" and IN_C[code] in verdict.text


@pytest.mark.skipif(sys.platform != "linux", reason="no child processes here")
def test_what_a_function_prints_in_a_child_is_printed_up_to_a_limit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "def loud(tokens, size):\n    print('x' * 9000)\n    return -(-tokens // size)\n"
    assert_accepted("98.2", function_from(code, "loud"))
    shown = capsys.readouterr().out
    assert 19_900 <= shown.count("x") <= 20_000 and shown.endswith("(it prints more than is shown)\n")


# -- what tests of exercises stand on -------------------------------------------------------------

PROSE = """\
> **Exercise 98.1 · Count pages** · difficulty ●○○ · ~10 minutes
>
> Say how many."""
SOLUTION = """\
<details><summary>Hint</summary>

```python
1 / 0
```
</details>

<details>
<summary><b>Solution</b>, one of several</summary>

```python
def pages(tokens, size):
    return {}
```

</details>"""


def test_a_solution_is_found_by_the_exercise_it_follows() -> None:
    cells = [
        new_markdown_cell("<details><summary>Solution</summary>of nothing</details>"),
        new_markdown_cell(PROSE),
        new_code_cell("def pages(tokens, size):\n    raise NotImplementedError"),
        new_markdown_cell(SOLUTION.format(1)),
        new_markdown_cell(PROSE.replace("98.1", "98.2")),
        new_markdown_cell(SOLUTION.format(2)),
    ]
    found = boxes(cells)
    assert list(found) == ["98.1", "98.2"]
    (body,) = folded(found["98.2"], "Solution")
    assert "return 2" in body and "return 1" not in body and "1 / 0" not in body


def test_a_solution_has_to_be_complete() -> None:
    with pytest.raises(NameError):
        function_from("def f():\n    return torch.zeros(1)\n", "f")()
    assert torch.equal(
        function_from("import torch\n\ndef f():\n    return torch.zeros(1)\n", "f")(), torch.zeros(1)
    )


def test_the_assertions_bite() -> None:
    right, wrong = (lambda tokens, size: -(-tokens // size)), (lambda tokens, size: 0)
    with pytest.raises(AssertionError, match="took a wrong answer"):
        assert_refused("98.1", right, "page")
    with pytest.raises(AssertionError, match="for another reason"):
        assert_refused("98.1", wrong, "no such words")
    with pytest.raises(AssertionError, match="refused a right answer"):
        assert_accepted("98.1", wrong)
    with pytest.raises(AssertionError, match="took the stub for an answer"):
        assert_open("98.1", wrong)
    assert isinstance(assert_accepted("98.1", right).pictures[0][1], Picture)
