"""What every check of an exercise promises: one vocabulary, and it survives any answer."""

import sys

import pytest
import torch

from exercises import NotAttempted, equal, exercise, short


@exercise
def check_half(ask):
    """Half of a number, rounded down."""
    yield "half of 4 is 2", equal(ask(4), 2), "4 / 2 = 2"
    yield "half of 5 is 2, rounded down", ask(5) == 2, "5 // 2 = 2"


def raising(error):
    def half(n):
        raise error
    return half


def test_a_result_is_shown_and_is_true_when_passed():
    right, wrong = check_half(lambda n: n // 2), check_half(lambda n: n / 2)
    assert right and repr(right) == "passed: all 2 properties hold"
    assert not wrong and repr(wrong) == (
        "failed: half of 5 is 2, rounded down\n5 // 2 = 2\nyou returned 2.5 for <lambda>(5)")


@pytest.mark.parametrize("stub", [lambda n: None, lambda n: ..., raising(NotImplementedError())])
def test_a_stub_is_not_attempted(stub):
    assert repr(check_half(stub)) == "not attempted"


def test_a_branch_without_return_is_no_stub():
    result = check_half(lambda n: 2 if n == 4 else None)
    assert repr(result).startswith("failed: <lambda>(5) returns nothing\n")


@pytest.mark.parametrize("error", [
    ZeroDivisionError("division by zero"), StopIteration("over"), SystemExit(1), GeneratorExit(),
    RecursionError("too deep"), AssertionError(), type("Odd", (BaseException,), {})("odd")])
def test_it_survives_whatever_a_function_raises_and_says_which_call_raised(error):
    first, *rest = repr(check_half(raising(error))).split("\n")
    assert first == f"failed: half(4) raised {type(error).__name__}"
    assert rest == [str(error)] * bool(str(error))


def test_the_reader_is_told_the_line_of_an_error_also_where_it_comes_later():
    names = {"torch": torch}
    exec("def whole():\n    def use(x):\n        return x @ torch.ones(3)\n    return use", names)

    @exercise
    def check_later(ask):
        yield "it can be used", ask()(torch.ones(2)) == 2, ""

    def half(n):
        return n / 0

    said = repr(check_later(names["whole"]))
    assert said.startswith("failed: your code cannot be used\nRuntimeError: ")
    assert said.endswith("\nat line 3")  # with the line itself where it is known, as in a notebook
    assert "raised ZeroDivisionError" in repr(check_half(half))


def test_an_interrupt_is_the_reader_s():
    with pytest.raises(KeyboardInterrupt):
        check_half(raising(KeyboardInterrupt()))


def test_a_function_with_other_arguments_is_told_which_call_failed():
    result = repr(check_half(lambda: 2))
    assert result.startswith("failed: <lambda>(4) raised TypeError\n")


@pytest.mark.parametrize("answer", ["two", [1, [2]], object(), {}, lambda: 2, sys])
def test_an_answer_of_another_kind_is_shown(answer):
    assert f"you returned {short(answer)} for <lambda>(4)" in repr(check_half(lambda n: answer))

    @exercise
    def check_shape(ask):
        yield "one row", ask().shape == (1,), ""

    assert repr(check_shape(lambda: answer)).startswith("failed: what <lambda>() returned cannot")


def test_a_check_may_say_itself_that_nothing_was_attempted():
    @exercise
    def check_module(ask):
        if not ask():
            raise NotAttempted
        yield "something", True, ""

    assert repr(check_module(dict)) == "not attempted" and check_module(lambda: {1: 2})


def test_answers_are_shown_in_a_few_words():
    assert short(torch.tensor([1 / 3, 2.0])) == "[0.3333, 2.0] (float32)"
    assert short(torch.zeros(2, 30).bool()) == "bool of shape [2, 30]"
    assert short((torch.tensor(3), torch.zeros(99))) == "(3 (int64), float32 of shape [99])"
    assert len(short(list(range(1000)))) < 60 and short(0.123456) == "0.1235"
    batch = torch.zeros(4, 3, 8, 8), torch.Generator()
    assert short([batch] * 9).startswith("[(float32 of shape [4, 3, 8, 8], Generator), (")
    assert short([batch] * 9).endswith(", ...]") and short(short) == "short"


def test_numbers_are_compared_whatever_their_type():
    assert equal(torch.tensor([1, 2]), [1.0, 2.0]) and equal(True, 1) and equal(1e-6, 0)
    assert not equal([1, 2], [[1, 2]]) and not equal("1", 1) and not equal(float("nan"), 1)
    assert equal(1.01, 1, 0.02) and not equal(1.01, 1)
