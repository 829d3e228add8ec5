"""Turn JSONL into Megatron's .bin/.idx files with a loss mask.

    megatron-dms preprocess --input train.jsonl --tokenizer DIR --output-prefix data/train --workers 8

Each line is one document. {"messages": [{"role": ..., "content": ...}, ...]} goes through the tokenizer's
chat template; {"text": ...} is closed with the tokenizer's EOS token. Documents without a prediction target
are skipped and counted. The tool writes PREFIX.bin/.idx (token ids) and PREFIX_loss_mask.bin/.idx (1 = the
token counts as a prediction target): all four files or none.

The last line of the output is JSON: documents, tokens, target_tokens, skipped, seconds, output_prefix. Bad
input: one line `error: FILE:LINE: ...` on stderr, exit status 2, nothing is written; interrupted: 130.
"""

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

from megatron_dms.command_line import Parser, count, exit_status, say, tool_parser

PROGRAM = "megatron-dms preprocess"


def _parser(program: str) -> Parser:
    parser = tool_parser(__doc__, PROGRAM, program)
    add = parser.add_argument
    add("--input", nargs="+", required=True, metavar="FILE", help="JSONL files, read in this order")
    add("--tokenizer", required=True, metavar="DIR", help="folder of the HF tokenizer")
    text = "writes PREFIX.bin/.idx and PREFIX_loss_mask.bin/.idx; replaces existing files at the end"
    add("--output-prefix", required=True, metavar="PREFIX", help=text)
    text = (
        "which tokens of a chat are prediction targets (default: %(default)s, including the end of each "
        "turn); all tokens of a text are"
    )
    add("--loss-on", choices=("assistant", "all"), default="assistant", help=text)
    text = "Jinja template to use instead of the tokenizer's own (default: the tokenizer's)"
    add("--chat-template", metavar="FILE", help=text)
    text = "number of processes that encode (default: %(default)s)"
    add("--workers", type=count, default=1, metavar="N", help=text)
    text = "read at most N documents; blank lines do not count (default: all)"
    add("--max-documents", type=count, metavar="N", help=text)
    return parser


def main(argv: list[str] | None = None, program: str = PROGRAM) -> int:
    """Preprocess the files that the options name; the return value is the exit status."""
    options = _parser(program).parse_args(argv)
    # Tokenizers warn, and may deadlock, when they start threads beside our processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A polite kill must clean up too: leave through the `finally` clauses.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        return exit_status(lambda: _run(options), "nothing was written")
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> None:
    from megatron_dms.data.preprocess import (  # late: --help is quick
        PreprocessConfig,
        ProgressLine,
        preprocess,
    )

    start = time.monotonic()
    template = options.chat_template
    config = PreprocessConfig(
        inputs=tuple(options.input),
        tokenizer=options.tokenizer,
        output_prefix=options.output_prefix,
        loss_on=options.loss_on,
        chat_template=Path(template).read_text(encoding="utf-8") if template else None,
        workers=options.workers,
        max_documents=options.max_documents,
    )
    summary = preprocess(config, ProgressLine(say))
    seconds = round(time.monotonic() - start, 3)
    print(json.dumps(asdict(summary) | {"seconds": seconds, "output_prefix": options.output_prefix}))
