"""The tiny reasoner: its problems, its tokenizer, its answers, and the committed base model."""

import importlib
import itertools
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[3] / "examples" / "tiny_reasoner"
BASE = FOLDER / "base"
# Shortest and longest conversation of the default difficulty: 12 and 16 lines, 3 of them constants.
FEWEST_TOKENS, MOST_TOKENS = 216, 284
REQUIRED_ACCURACY = 0.90
# The first held-out problem of seed 1000, the seed of the published accuracy.
GOLDEN_QUESTION = (
    "k = 0 ; l = 0 ; m = 4 ; n = m * l ; o = m - k ; p = o + k ; q = l - k ; r = o - l ; s = l "
    "* o ; t = q + o ; u = s + t ; v = t * u ; w = o + p ; what is w ?"
)


def script(name: str) -> ModuleType:
    """Import a module of the example's folder as the scripts there import each other."""
    return importlib.import_module(name)


def take(split: str, seed: int, count: int, **difficulty: Any) -> list[dict[str, Any]]:
    problems = script("problems")
    return list(itertools.islice(problems.generate(split, seed, problems.Difficulty(**difficulty)), count))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(BASE)


def solve(question: str) -> tuple[dict[str, int], str]:
    """Work out a problem line by line with Python's `eval`; return every value by name, and the name asked
    for."""
    *lines, last = question.split(" ; ")
    values: dict[str, int] = {}
    for line in lines:
        name, expression = line.split(" = ")
        assert name not in values, f"{name} is assigned twice"
        values[name] = eval(expression, {}, dict(values)) % 10
    asked = re.fullmatch(r"what is ([a-z]) \?", last)
    assert asked is not None
    return values, asked.group(1)


def test_generator_is_a_function_of_its_arguments() -> None:
    """Catches hidden state (the global random generator, hash randomisation) and a seed that is not used."""
    assert take("train", 3, 20) == take("train", 3, 20)
    assert take("train", 3, 20) != take("train", 4, 20)
    first = take("heldout", 1000, 1)[0]
    # A golden value: a change here silently changes what every published accuracy was measured on.
    assert first["messages"][1]["content"] == GOLDEN_QUESTION


def test_splits_are_disjoint_by_construction() -> None:
    """Catches a split made by seed or position, which lets a training problem turn up in the held-out set.

    Programs of three lines are few enough to collide often, so overlap would show at once.
    """
    short = {"min_lines": 3, "max_lines": 3, "constants": 2, "operations": "+"}
    train = {p["messages"][1]["content"] for seed in range(3) for p in take("train", seed, 3000, **short)}
    heldout = {p["messages"][1]["content"] for seed in range(3) for p in take("heldout", seed, 500, **short)}
    repeated = {p["messages"][1]["content"] for p in take("train", 99, 3000, **short)}
    assert train & repeated, "the check has no power: even two training sets of this size share nothing"
    assert not train & heldout
    problems = script("problems")
    assert {problems.split_of(q) for q in train} == {"train"}
    assert {problems.split_of(q) for q in heldout} == {"heldout"}


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_chain_of_thought_is_right(split: str) -> None:
    """Catches wrong arithmetic (a modulo's sign, left and right swapped), stale values, a wrong answer."""
    for problem in take(split, 5, 200):
        question, chain = (m["content"] for m in problem["messages"][1:])
        values, asked = solve(question)
        *steps, conclusion, final = chain.split(" ; ")
        assert [step.split(" = ")[0] for step in steps] == list(values), "not every line once, in order"
        for step, line in zip(steps, question.split(" ; "), strict=False):
            left, result = step.split(" -> ")
            named = re.findall(r"([a-z]) (\d)", left)
            assert all(values[name] == int(value) for name, value in named), step
            # Without the values, the step must be the program's line.
            assert re.sub(r"([a-z]) \d", r"\1", left) == line
            name, value = result.split()
            assert line.startswith(f"{name} = ") and values[name] == int(value), step
        assert conclusion == f"so {asked} {values[asked]}"
        assert final == f"answer {values[asked]}"
        assert problem["answer"] == str(values[asked])


def test_some_values_matter_later_and_many_do_not() -> None:
    """Catches problems that need no memory (operands always recent) or where nothing can be dropped."""
    distances, unused, computed = [], 0, 0
    for problem in take("train", 6, 200):
        lines = [line.split(" = ") for line in problem["messages"][1]["content"].split(" ; ")[:-1]]
        names = [name for name, _ in lines]
        used = [(index, name) for index, (_, text) in enumerate(lines) for name in re.findall(r"[a-z]", text)]
        distances += [index - names.index(name) for index, name in used]
        unused += len(set(names) - {name for _, name in used})
        computed += len(names)
    assert sum(distance > 4 for distance in distances) > 0.3 * len(distances)
    assert unused > 0.15 * computed


def test_difficulty_is_checked() -> None:
    """Catches a knob that is accepted and then ignored or crashes in the middle of a file."""
    problems = script("problems")
    wrongs = ({"constants": 1}, {"max_lines": 27}, {"min_lines": 9, "max_lines": 8}, {"operations": "+/"})
    for wrong in wrongs:
        with pytest.raises(ValueError):
            problems.Difficulty(**wrong)
    longer = take("train", 1, 50, min_lines=20, max_lines=22)
    assert {len(p["messages"][1]["content"].split(" ; ")) - 1 for p in longer} == {20, 21, 22}


def test_command_line_writes_the_file_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a CLI unlike the generator, one that leaves a part file, or ends without its JSON line."""
    out = tmp_path / "heldout.jsonl"
    arguments = ["--split", "heldout", "--count", "7", "--seed", "2", "--out", str(out)]
    assert script("problems").main(arguments) == 0
    assert [json.loads(line) for line in out.read_text().splitlines()] == take("heldout", 2, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["heldout.jsonl"]
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["count"] == 7
    assert script("problems").main([*arguments[:-1], str(tmp_path / "missing" / "x.jsonl")]) == 2


def test_tokenizer_round_trip_and_lengths(tokenizer: Any) -> None:
    """Catches a word missing from the vocabulary, lost spaces, and problems outside the promised length."""
    lengths = []
    for problem in take("train", 8, 300):
        text = tokenizer.apply_chat_template(problem["messages"], tokenize=False)
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == text
        assert tokenizer.unk_token_id not in ids
        lengths.append(len(ids))
    assert min(lengths) >= FEWEST_TOKENS and max(lengths) <= MOST_TOKENS


def test_committed_tokenizer_is_what_the_script_builds(tokenizer: Any, tmp_path: Path) -> None:
    """Catches a vocabulary or template edited in the script but not in base/, or the other way round."""
    make_tokenizer = script("make_tokenizer")
    built = make_tokenizer.build_tokenizer()
    built(["a", "a b"], padding=True)  # a padded batch must leave no trace in what is saved
    make_tokenizer.save_tokenizer(built, tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_text() == (BASE / path.name).read_text(), path.name
    config = json.loads((BASE / "config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    named = {name: config[f"{name}_token_id"] for name in ("pad", "bos", "eos")}
    assert named == {name: getattr(tokenizer, f"{name}_token_id") for name in named}


def test_chat_template_marks_exactly_the_assistant(tokenizer: Any) -> None:
    """Catches a mask that is shifted by one, misses the end of turn, or takes in the prompt."""
    system, user, assistant = take("train", 9, 1)[0]["messages"]
    conversation = [system, user, assistant, user, assistant]
    encoded = tokenizer.apply_chat_template(conversation, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = encoded["input_ids"], encoded["assistant_masks"]
    turn = assistant["content"] + " <|im_end|>"
    assert tokenizer.decode([i for i, marked in zip(ids, mask, strict=True) if marked]) == f"{turn} {turn}"
    prompt_text = tokenizer.apply_chat_template([system, user], add_generation_prompt=True, tokenize=False)
    prompt = tokenizer(prompt_text)["input_ids"]
    assert ids[: len(prompt)] == prompt, "the prompt is not a prefix of the conversation"
    assert mask.index(1) == len(prompt)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("a = 7 -> a 7 ; so a 7 ; answer 7 <|im_end|>", "7"),
        ("so a 7 ; answer 7<|im_end|> <pad> <pad>", "7"),
        ("answer 7", "7"),
        ("answer 12 .", "12"),
        ("answer 3 ; b = 4 ; answer 5 <|im_end|>", "5"),
        ("so a 7 ; answer 7 <|im_end|> <|im_start|> user answer 9", "7"),
        ("so a 7 ; answer <|im_end|>", None),
        ("a = 7 -> a 7 ; so a 7", None),
        ("answer 7 ; b = 4 -> b 4", None),
        ("answer x", None),
        ("answers 7", None),
        ("the answer7", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: str | None) -> None:
    """Catches credit for a truncated or rambling text, or for something said after the end of the turn."""
    assert script("answers").extract_answer(text) == answer


def test_exact_match_counts_and_refuses_uneven_lists() -> None:
    """Catches a missing answer counted as right, and texts silently paired with the wrong problems."""
    answers = script("answers")
    assert answers.exact_match(["answer 1", "answer 2", "so"], ["1", "3", "None"]) == [True, False, False]
    with pytest.raises(ValueError, match="2 texts but 1 answers"):
        answers.exact_match(["answer 1", "answer 2"], ["1"])


def test_committed_base_solves_heldout_problems(tokenizer: Any) -> None:
    """Catches a half-trained or damaged checkpoint, wrong padding, a stale model card."""
    transformers = pytest.importorskip("transformers")
    measure = script("measure")
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small lose more to waiting for one another than they gain
    try:
        accuracy = measure.greedy_accuracy(model, tokenizer, measure.heldout_problems(64, seed=77))
    finally:
        torch.set_num_threads(threads)
    assert accuracy >= REQUIRED_ACCURACY, f"{accuracy:.3f} of 64 held-out problems solved"
    for readme in (BASE / "README.md", FOLDER / "README.md"):
        assert f"{model.num_parameters():,} parameters" in " ".join(readme.read_text().split()), readme


def test_lines_of_three_are_worked_out_from_left_to_right() -> None:
    """Catches a chain of thought that multiplies first, and a line that says other variables than it
    combines."""
    for problem in take("train", 7, 40, min_lines=8, max_lines=12, operands=3):
        _, question, chain = (message["content"] for message in problem["messages"])
        *lines, last = question.split(" ; ")
        values: dict[str, int] = {}
        for line, thought in zip(lines, chain.split(" ; "), strict=False):
            name, expression = line.split(" = ")
            first, *rest = expression.split()
            value = values[first] if first.isalpha() else int(first)
            for operation, other in zip(rest[::2], rest[1::2], strict=True):
                value = eval(f"{value} {operation} {values[other]}") % 10
            values[name] = value
            assert len(rest) in (0, 4)
            assert thought.endswith(f"-> {name} {value}")
        assert problem["answer"] == str(values[last.split()[2]])


@pytest.mark.parametrize("operands", [1, 4])
def test_lines_cannot_combine_more_than_there_is(operands: int) -> None:
    """Catches a difficulty that fails only when a problem is drawn."""
    with pytest.raises(ValueError, match=f"operands = {operands}, constants = 3"):
        script("problems").Difficulty(operands=operands)
