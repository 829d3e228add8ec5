"""Run one generated program under limits: code_answers.py starts this file with `python -I`.

This file must not import the package: everything that it needs is in the folder that it is started in.
"""

import json
import os
import resource
import sys
from typing import Any

MEMORY_EXIT = 97
"""Exit status of a program that ran out of memory."""
_RECURSION_LIMIT = 50_000
# Names that data sets of programming tasks take for granted, such as the types in signatures (List[int]).
# If several modules have a name, the last import counts: the classes of collections replace typing's, the
# built-in pow replaces math's, which takes no modulus, and modules replace functions of their name (bisect).
_PRELUDE = """
from typing import *
from bisect import *
from collections import *
from copy import *
from functools import *
from heapq import *
from itertools import *
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


def main() -> None:
    """Run program.py under the limits in the first argument (JSON). If there is a call.json, call what it
    names."""
    set_limits(json.loads(sys.argv[1]))
    sys.argv = ["program.py"]
    sys.setrecursionlimit(_RECURSION_LIMIT)
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
            text = json.dumps(result, default=lambda value: {"not JSON": repr(value)})
            with open("result.json", "w", encoding="utf-8") as file:
                file.write(text)
    except MemoryError:
        os._exit(MEMORY_EXIT)


if __name__ == "__main__":
    main()
