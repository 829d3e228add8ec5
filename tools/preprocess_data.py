#!/usr/bin/env python
"""JSONL → Megatron's .bin/.idx files with a loss mask.

    python tools/preprocess_data.py --input train.jsonl --tokenizer DIR --output-prefix data/train --workers 8

Each line is one document, {"messages": [{"role": …, "content": …}, …]} or {"text": …}. Written are
PREFIX.bin/.idx (token ids) and PREFIX_loss_mask.bin/.idx (1 = the token counts as a prediction target), all
four or none. The last line of the output is JSON: documents, tokens, target_tokens, skipped, seconds,
output_prefix.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path

# `python tools/x.py` puts tools/ on the path, not the repository.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Turn chat or text JSONL into Megatron's .bin/.idx files with a loss mask.",
        epilog='Each line is one document: {"messages": [{"role": ..., "content": ...}, ...]} goes through '
        "the "
        'tokenizer\'s chat template, {"text": ...} is closed with its EOS token. Documents without a '
        "prediction "
        "target are skipped and counted. Bad input: one line 'error: FILE:LINE: ...', exit code 2, nothing "
        "written.",
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="FILE", help="JSONL files, read in this order"
    )
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="directory of the HF tokenizer")
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="PREFIX",
        help="writes PREFIX.bin/.idx and PREFIX_loss_mask.bin/.idx; files of that name are replaced at the "
        "end",
    )
    parser.add_argument(
        "--loss-on",
        choices=("assistant", "all"),
        default="assistant",
        help="which tokens of a chat are prediction targets (default: %(default)s, with the end of each "
        "turn); "
        "in text all are",
    )
    parser.add_argument(
        "--chat-template",
        metavar="FILE",
        help="a Jinja template in place of the tokenizer's own (default: the tokenizer's)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=1,
        metavar="N",
        help="number of processes that encode (default: %(default)s)",
    )
    parser.add_argument(
        "--max-documents",
        type=int,
        metavar="N",
        help="read at most N documents, blank lines not counted (default: all)",
    )
    return parser


def main() -> int:
    args = parser().parse_args()
    # Tokenizers warn, and may deadlock, when they start threads beside our processes.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    # A polite kill must clean up too: leave through the `finally` clauses.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    from megatron_dms.data.preprocess import PreprocessConfig, ProgressLine, preprocess

    start = time.monotonic()
    try:
        config = PreprocessConfig(
            inputs=tuple(args.input),
            tokenizer=args.tokenizer,
            output_prefix=args.output_prefix,
            loss_on=args.loss_on,
            chat_template=Path(args.chat_template).read_text(encoding="utf-8")
            if args.chat_template
            else None,
            workers=args.workers,
            max_documents=args.max_documents,
        )
        summary = preprocess(config, ProgressLine(lambda line: print(line, file=sys.stderr, flush=True)))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted, nothing written", file=sys.stderr)
        return 130
    seconds = round(time.monotonic() - start, 3)
    print(json.dumps(asdict(summary) | {"seconds": seconds, "output_prefix": args.output_prefix}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
