"""Build the tiny reasoner's tokenizer: one token for each word, Hugging Face format, with a chat template.

Words are separated by single spaces, also around special tokens, so decode(encode(text)) gives the text back.
The template is ChatML with spaces for line breaks. The assistant's words stand between generation markers, so
`apply_chat_template(..., return_assistant_tokens_mask=True)` tells which tokens to train on.

Run: python examples/tiny_reasoner/make_tokenizer.py --out examples/tiny_reasoner/base
"""

import argparse
import json
import string
import sys
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, UNKNOWN, BOS, TURN, EOS = "<pad>", "<unk>", "<bos>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, UNKNOWN, BOS, TURN, EOS)
ROLES = ("system", "user", "assistant")
SYMBOLS = ("=", "+", "-", "*", "->", ";", "?", ".", ",", ":", "(", ")")
WORDS = tuple("work out each line modulo ten then answer what is so the and of value if".split())
MAX_LENGTH = 1024

# The assistant's turn up to and including its end-of-turn token is what the model is trained to say.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ ' <|im_start|> assistant ' }}"
    "{% generation %}{{ message['content'] + ' <|im_end|>' }}{% endgeneration %}"
    "{% else %}"
    "{{ ' <|im_start|> ' + message['role'] + ' ' + message['content'] + ' <|im_end|>' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ ' <|im_start|> assistant ' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """Return all tokens in the order of their ids."""
    return [*SPECIAL_TOKENS, *ROLES, *string.digits, *string.ascii_lowercase, *SYMBOLS, *WORDS]


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer. It pads on the right, for training; generation in batches needs padding on the
    left."""
    tokens = vocabulary()
    word_level = Tokenizer(WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNKNOWN))
    word_level.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_level,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BOS,
        eos_token=EOS,
        additional_special_tokens=[TURN],
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write the tokenizer's files in the form that both transformers 4 and 5 read.

    transformers 5 writes names that version 4 does not know, but still reads version 4's.
    """
    tokenizer.backend_tokenizer.no_padding()  # otherwise the padding of the last batch is saved too
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = [TURN]
    config.pop("extra_special_tokens", None)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write the tokenizer's files and end with one JSON line."""
    parser = argparse.ArgumentParser(description="Write the tokenizer in Hugging Face format.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into; made if missing")
    args = parser.parse_args(argv)
    tokenizer = build_tokenizer()
    save_tokenizer(tokenizer, args.out)
    print(json.dumps({"out": str(args.out), "vocab_size": len(tokenizer)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
