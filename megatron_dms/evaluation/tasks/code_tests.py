"""The tests of a LiveCodeBench problem, read from the texts in a row of the dataset."""

import base64
import binascii
import json
import pickletools
import zlib
from dataclasses import dataclass
from typing import Any

from megatron_dms.evaluation.code_answers import CallTest, StdinTest, allow_long_numbers

_MOST_BYTES = 4 << 30  # of one problem's unpacked tests; larger ones are taken for a decompression bomb
_TEXTS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_HARMLESS = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")


@dataclass(frozen=True)
class CodeTests:
    """Tests of one problem. Private tests stay packed: unpacked, those of all problems take gigabytes."""

    where: str
    """File and line, for messages."""
    public: str
    private: str
    """JSON, or a JSON text that was pickled, compressed by zlib and encoded in base64."""
    function: str | None
    """Name of the function that functional tests call."""

    def unpack(self) -> list[StdinTest | CallTest]:
        """Return all tests, the public ones first.

        Raises:
            ValueError: the tests are not as documented. A pickle that holds anything but a text is refused,
                and nothing of it is run.
        """
        allow_long_numbers()
        try:
            entries = [*_entries(self.public), *_entries(_unpacked(self.private))]
            tests = [self._test(entry) for entry in entries]
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.where}: tests: {error}") from error
        if not tests:
            raise ValueError(f"{self.where}: found no tests, expected at least one")
        return tests

    def _test(self, entry: Any) -> StdinTest | CallTest:
        parts = ("input", "output", "testtype")
        if not isinstance(entry, dict) or not all(isinstance(entry.get(part), str) for part in parts):
            raise ValueError(f"found {str(entry)[:60]}, expected an object with the texts {', '.join(parts)}")
        given, expected, kind = (entry[part] for part in parts)
        if kind == "stdin":
            return StdinTest(given, expected)
        if kind != "functional":
            raise ValueError(f"found testtype {kind!r}, expected stdin or functional")
        if self.function is None:
            raise ValueError("found a functional test, but metadata without func_name")
        # Each line is one argument.
        return CallTest(self.function, [json.loads(line) for line in given.split("\n")], json.loads(expected))


def _entries(text: str) -> list[Any]:
    entries = json.loads(text)
    if not isinstance(entries, list):
        raise ValueError(f"found {text[:60]!r}, expected a list")
    return entries


def _unpacked(text: str) -> str:
    if text.lstrip().startswith("["):
        return text
    try:
        unpacker = zlib.decompressobj()
        pickled = unpacker.decompress(base64.b64decode(text, validate=True), _MOST_BYTES)
    except (binascii.Error, zlib.error) as error:
        raise ValueError(f"found private tests that are neither JSON nor packed: {error}") from error
    if not unpacker.eof:
        raise ValueError(f"found private tests cut short or of more than {_MOST_BYTES} bytes")
    return _pickled_text(pickled)


def _pickled_text(pickled: bytes) -> str:
    """Return the text in a pickle that holds one str.

    The pickle is read and never run. Only the instructions that a str needs are accepted; an instruction such
    as the name of a class or a function is refused.

    Raises:
        ValueError: the pickle is damaged or holds anything else.
    """
    texts: list[str] = []
    for instruction, argument, _ in pickletools.genops(pickled):  # raises ValueError if the pickle is damaged
        if instruction.name in _TEXTS:
            texts.append(str(argument))
        elif instruction.name not in _HARMLESS:
            found = f"{instruction.name} {str(argument)[:60]}" if argument is not None else instruction.name
            raise ValueError(f"found {found} in the pickle of the private tests, expected a text; refused")
    if len(texts) != 1:
        raise ValueError(f"found {len(texts)} texts in the pickle of the private tests, expected one")
    return texts[0]
