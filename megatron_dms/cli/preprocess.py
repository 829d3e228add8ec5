"""Turn JSONL into Megatron's .bin/.idx files with a loss mask.

    megatron-dms preprocess --input train.jsonl --tokenizer DIR --output-prefix data/train --workers 8

Each row is one document: a line of JSON, an object of a JSON array, or a row of parquet or Arrow; files may
be compressed (gzip, zstd, bzip2, xz). {"messages": [{"role": ..., "content": ...}, ...]} and ShareGPT's
"conversations" go through the tokenizer's chat template, with "tools" beside them; {"text": ...} is closed
with the tokenizer's EOS token, and so are {"prompt": ..., "completion": ...}, or they are two lists of
messages. A chat template that leaves out part of a chat is refused. Documents without a prediction target
are skipped and counted. The tool writes PREFIX.bin/.idx (token ids) and PREFIX_loss_mask.bin/.idx (1 = the
token counts as a prediction target): all four files or none.

The last line of the output is JSON: documents, tokens, target_tokens, skipped, not_in_tokens (columns and
fields that are in no token, with their numbers of documents), seconds, output_prefix. Bad input: one line
`error: FILE:LINE: ...` on stderr, exit status 2, nothing is written; interrupted: 130.
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
    text = "JSONL, JSON, parquet or Arrow files, compressed or not; read in this order"
    add("--input", nargs="+", required=True, metavar="FILE", help=text)
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
    text = (
        "the column to read (a text, or messages), or the columns of prompt and completion (default: "
        "messages, conversations, text, or prompt and completion)"
    )
    add("--field", nargs="+", default=[], metavar="NAME", help=text)
    text = "columns, and fields of messages, to leave out and count (default: refuse what a template loses)"
    add("--drop-field", nargs="+", default=[], metavar="NAME", help=text)
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
        fields=tuple(options.field),
        drop_fields=tuple(options.drop_field),
        workers=options.workers,
        max_documents=options.max_documents,
    )
    summary = preprocess(config, ProgressLine(say))
    if summary.not_in_tokens:
        found = ", ".join(
            f"{name} ({count} documents)" for name, count in sorted(summary.not_in_tokens.items())
        )
        say(f"note: in no token: {found}")
    seconds = round(time.monotonic() - start, 3)
    print(json.dumps(asdict(summary) | {"seconds": seconds, "output_prefix": options.output_prefix}))
