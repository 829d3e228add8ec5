#!/usr/bin/env python
"""Turn OpenR1-Math-220k, the authors' reasoning data, into JSONL for tools/preprocess_data.py.

    python examples/openr1.py --out data/openr1.jsonl             chats, for models with a chat template
    python examples/openr1.py --out data/openr1-text.jsonl --text plain text, for base models

There is one line for each answer of DeepSeek-R1 that is complete and that Math-Verify found right ("verified
answers", DMS paper); a problem may have several such answers. The data set is public:
open-r1/OpenR1-Math-220k, config default. The last line of the output is JSON: problems, answers, path.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone, installed or not

from megatron_dms.command_line import Parser, say_error
from megatron_dms.evaluation.tasks.dataset_files import DatasetRow
from megatron_dms.evaluation.tasks.source import Dataset
from megatron_dms.files import output_file

OPENR1 = Dataset("open-r1/OpenR1-Math-220k", "train", "default")
_VERDICTS = ("correctness_math_verify", "is_reasoning_complete")


def answers(row: DatasetRow) -> Iterator[str]:
    """Yield the verified answers of a row, thoughts included. An answer without a verdict is not verified.

    Raises:
        ValueError: a column is missing or of another type; the message names the row.
    """
    row.require(*_VERDICTS)
    verdicts = (row.fields[name] or [] for name in _VERDICTS)  # null or shorter in rows never judged
    for text, *each in zip(row.get("generations", list), *verdicts, strict=False):
        if all(each):
            yield text


def line(problem: str, answer: str, text: bool) -> dict[str, object]:
    """Return one document of the JSONL file."""
    if text:
        return {"text": f"{problem}\n\n{answer}"}
    turns = (("user", problem), ("assistant", answer))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="new JSONL file")
    parser.add_argument(
        "--source",
        type=Path,
        metavar="PATH",
        help="a file of the data set, or its folder data (default: the hub)",
    )
    parser.add_argument(
        "--text", action="store_true", help="write problem and answer as one text and not as a chat"
    )
    return parser


def main() -> int:
    """Write the file and return the exit status."""
    options = _parser().parse_args()
    problems = written = 0
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with output_file(options.out) as write:
            for row in OPENR1.rows(options.source):
                problems += 1
                for answer in answers(row):
                    write(json.dumps(line(row.text("problem"), answer, options.text)) + "\n")
                    written += 1
            if not written:
                raise ValueError(f"no verified answer in {problems} problems; is this OpenR1-Math-220k?")
    except (ValueError, OSError) as error:
        return say_error(error)
    print(json.dumps({"problems": problems, "answers": written, "path": str(options.out)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
