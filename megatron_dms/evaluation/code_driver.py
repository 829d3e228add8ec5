"""Run one generated program under limits: code_answers.py starts this file with `python -I`.

This file must not import the package: everything that it needs is in the folder that it is started in.
"""

import json
import os
import resource
import runpy
import sys
from typing import Any

MEMORY_EXIT = 97
"""Exit status of a program that ran out of memory."""
SANDBOX_EXIT = 98
"""Exit status if the system refuses the sandbox; no program has run."""
MOST_DIGITS = 50_000
"""Of a whole number that is read or written, as LiveCodeBench's own checker allows."""
_RECURSION_LIMIT = 50_000
# Names that data sets of programming tasks take for granted, such as the types in signatures (List[int]).
# If several modules have a name, the last import counts: the classes of collections replace typing's, the
# built-in pow replaces math's, which takes no modulus, and modules replace functions of their name (bisect).
_PRELUDE = """
from typing import *
from bisect import *
from collections import *
from copy import *
from datetime import *
from functools import *
from heapq import *
from io import *
from itertools import *
from json import *
from math import *
from operator import *
from random import *
from re import *
from statistics import *
from string import *
from sys import *
from builtins import *
import bisect, collections, copy, datetime, functools, heapq, io, itertools, json, math, operator, random, re
import statistics, string, sys, typing
"""


def set_limits(limits: dict[str, int]) -> None:
    """Set soft limits. The hard limit of CPU time is one second more: then the kernel kills a program that
    ignores SIGXCPU."""
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        wanted = value + 1 if name == "CPU" else value
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (min(value, most), most))


def _plain(value: Any) -> Any:
    """Return a result with Python's numbers in place of those of NumPy and others, and lists for arrays."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, dict):
        return {_plain(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if hasattr(value, "__index__") and not hasattr(value, "__len__"):
        return int(value)
    if type(value).__module__.partition(".")[0] == "numpy" and hasattr(value, "tolist"):
        return _plain(value.tolist())
    return value


def main() -> None:
    """Run program.py under the limits in the first argument (JSON), and in the sandbox that the second one
    describes, if there is one. If there is a call.json, call what it names."""
    if len(sys.argv) > 2:
        sandbox = json.loads(sys.argv[2])
        enter = runpy.run_path(sandbox.pop("code"))["enter"]
        try:
            enter(os.getcwd(), **sandbox)
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(SANDBOX_EXIT)
    set_limits(json.loads(sys.argv[1]))
    sys.argv = ["program.py"]
    sys.setrecursionlimit(_RECURSION_LIMIT)
    sys.set_int_max_str_digits(MOST_DIGITS)
    call = None
    if os.path.exists("call.json"):
        with open("call.json", encoding="utf-8") as file:
            call = json.load(file)
    with open("program.py", encoding="utf-8") as file:
        source = file.read()
    names: dict[str, Any] = {"__name__": "__main__" if call is None else "program"}
    try:
        exec(_PRELUDE, names)
        exec(compile(source, "program.py", "exec"), names)
        if call is not None:
            function = call["function"]
            owner: Any = names.get("Solution")
            target = getattr(owner(), function) if hasattr(owner, function) else names[function]
            result = target(*call["arguments"])
            text = json.dumps(_plain(result), default=lambda value: {"not JSON": repr(value)})
            with open("result.json", "w", encoding="utf-8") as file:
                file.write(text)
    except MemoryError:
        os._exit(MEMORY_EXIT)


if __name__ == "__main__":
    main()
