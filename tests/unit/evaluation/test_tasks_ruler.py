"""Generated long-context tasks: their length, what is hidden in them, and which answers count."""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_dms.evaluation.tasks import Problem, Task, load_task

BASE = Path(__file__).resolve().parents[3] / "examples" / "tiny_reasoner" / "base"
LONGEST_SENTENCE = 20  # words of the filler, generously


class Words:
    """A tokenizer of words; a template adds 7 tokens to a chat."""

    def __init__(self, template: bool) -> None:
        self.chat_template = "{{ messages }}" if template else None
        self.calls = 0

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        self.calls += 1
        return {"input_ids": [0] * len(text.split())}

    def apply_chat_template(self, messages: Any, tokenize: bool, add_generation_prompt: bool) -> str:
        assert add_generation_prompt and not tokenize
        return "a b c d " + messages[-1]["content"] + " e f g"


def text_of(problem: Problem) -> str:
    return problem.prompt if problem.prompt is not None else problem.messages[-1]["content"]


def correct(task: Task, *texts: str) -> list[bool]:
    return task.grade(task.problems[0], texts).correct


TASKS = [("ruler_niah", {"needles": 5, "asked": 2}), ("ruler_vt", {"chains": 3, "hops": 4})]


@pytest.mark.parametrize(("name", "options"), TASKS)
@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("length", [300, 5000])
def test_length(name: str, options: dict[str, int], template: bool, length: int) -> None:
    """Catches: the template's own tokens left out, prompts beyond the length or far below, a search that
    encodes the prompt for each sentence."""
    tokenizer = Words(template)
    task = load_task(name, limit=6, tokenizer=tokenizer, length=length, **options)
    assert tokenizer.calls < 6 * 14
    for problem in task.problems:
        assert (problem.prompt is None, bool(problem.messages)) == (template, template)
        tokens = len(text_of(problem).split()) + (7 if template else 0)
        assert length - LONGEST_SENTENCE < tokens <= length


def test_length_by_a_real_tokenizer() -> None:
    """Catches: a count without the template's special tokens, or one that adds special tokens twice."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(BASE)
    task = load_task("ruler_niah", limit=2, tokenizer=tokenizer, length=600)
    for problem in task.problems:
        text = tokenizer.apply_chat_template(problem.messages, tokenize=False, add_generation_prompt=True)
        count = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        assert 600 - 2 * LONGEST_SENTENCE < count <= 600


def test_needles() -> None:
    """Catches: values that occur twice or not at all, keys in the filler, distractors that are asked for, all
    needles at one depth."""
    task = load_task("ruler_niah", limit=40, tokenizer=Words(False), length=800, needles=4, asked=2)
    depths = []
    for problem in task.problems:
        text, end = text_of(problem).rsplit("\n\n", 1)
        pairs = re.findall(r"The secret number of (\S+) is (\d{7})\.", text)
        assert len(pairs) == 4 and len(set(dict(pairs).values())) == 4
        assert len(re.findall(r"\d", text)) == 4 * 7 and all(text.count(name) == 1 for name, _ in pairs)
        assert [value for name, value in pairs if name in end] == [
            value for _, value in pairs if value in problem.gold
        ]
        names = [name for gold in problem.gold for name, value in pairs if value == gold]
        assert ", ".join(names) in end and len(problem.gold) == 2
        assert not any(value in end for value in dict(pairs).values())
        depths += [text.index(value) / len(text) for value in problem.gold]
    quarters = Counter(int(4 * depth) for depth in depths)
    assert all(quarters[quarter] > 8 for quarter in range(4))


def test_variables() -> None:
    """Runs the program in the text; the program gives the answer. Catches: assignments out of order,
    distractors that lead to the value asked for, names in the filler."""
    task = load_task("ruler_vt", limit=30, tokenizer=Words(True), length=700, chains=3, hops=5)
    for problem in task.problems:
        text, end = text_of(problem).rsplit("\n\n", 1)
        values: dict[str, str] = {}
        for name, origin in re.findall(r"Set ([A-Z]{5}) = (\w+)\.", text):
            assert name not in values
            values[name] = origin if origin.isdigit() else values[origin]
        (asked,) = re.findall(r"\d{5}", end)
        assert len(values) == 18 and set(problem.gold) == {n for n, v in values.items() if v == asked}
        assert len(problem.gold) == 6 and text.count(asked) == 1
        assert len(set(values.values())) == 3 and not re.search(r"[A-Z]{5}", end)


def test_grades() -> None:
    """Catches: part of the answers or part of a number as enough, what was only thought, votes by wording."""
    task = load_task("ruler_niah", limit=1, tokenizer=Words(False), length=300, needles=3, asked=2)
    one, two = task.problems[0].gold
    texts = [f"{one} and {two}", f"{two}, then {one}.", f"{one}", f"{one}1 {two}", f"{one} {two} 1234567"]
    grades = task.grade(task.problems[0], [*texts, f"<think>{one} {two}</think>I forgot", "none"])
    assert grades.correct == [True, True, False, False, True, False, False]
    assert grades.classes == [0, 0, 2, 3, 4, None, None]
    assert grades.chains[1].answer == ", ".join(sorted((one, two)))
    task = load_task("ruler_vt", limit=1, tokenizer=Words(False), length=300, hops=2)
    names = task.problems[0].gold
    assert len(names) == 3
    assert correct(task, " ".join(names), ", ".join(names[:2]), " ".join(names).lower()) == [
        True,
        False,
        False,
    ]


def test_a_function_of_the_seed() -> None:
    """Catches: state of the global generator, a limit or a length that changes what is hidden."""
    tokenizer = Words(False)
    for name, options in TASKS:
        some = load_task(name, limit=4, tokenizer=tokenizer, length=400, **options).problems
        assert some == load_task(name, limit=6, tokenizer=tokenizer, length=400, **options).problems[:4]
        longer = load_task(name, limit=4, tokenizer=tokenizer, length=900, **options).problems
        assert [problem.gold for problem in longer] == [problem.gold for problem in some]
        other = load_task(name, limit=4, tokenizer=tokenizer, length=400, seed=1, **options).problems
        assert not {str(problem.gold) for problem in other} & {str(problem.gold) for problem in some}
        assert len({str(problem.gold) for problem in some}) == len({p.id for p in [*some, *other]}) / 2 == 4


def test_arguments(tmp_path: Path) -> None:
    for arguments, options, message in (
        (("ruler_niah", tmp_path), {}, "expected none: its problems are generated"),
        (("ruler_vt",), {}, "found no tokenizer, expected one"),
        (
            ("ruler_niah", None, 1, Words(True)),
            {"length": 9},
            "found length 9, expected at least the .* tokens",
        ),
        (("ruler_niah", None, 1, Words(True)), {"needles": 2, "asked": 3}, "found asked 3, needles 2"),
        (("ruler_niah", None, 1, Words(True)), {"needles": 626}, "found 626 needles, expected at most 625"),
        (("ruler_vt", None, 1, Words(True)), {"hops": 0}, "found chains 1, hops 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_task(*arguments, **options)
