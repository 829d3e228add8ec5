"""Run a tool of this package, in this process or in one of its own.

    done = run_tool("convert", "import", "--hf", source, "--megatron", target)
    assert done.status == 0, done.errors

In this process a run costs nothing but its work, as torch, transformers and Megatron are imported already.
Whatever a tool changes in the process is put back. `process=True` starts an interpreter instead. It is for
tests whose point is the process: a kill, stdin, or what an import brings in.
"""

import importlib.util
import logging
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from megatron_dms import cli

ROOT = Path(__file__).resolve().parents[2]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


class Done(NamedTuple):
    """How a tool ended."""

    status: int
    out: str
    error: str

    @property
    def errors(self) -> list[str]:
        """The lines of stderr."""
        return self.error.splitlines()


def run_tool(
    name: str,
    *words: object,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    process: bool = False,
    timeout: float = 120,
) -> Done:
    """Run a tool to its end, and return its exit status and what it printed.

    Args:
        name: The tool, such as "convert"; or the path of a script that has a `main()`, such as
            "examples/openr1.py".
        words: The command line, each word turned into text.
        cwd: The folder to run in (default: the one of this process).
        env: Environment variables to set in addition to those of this process; None removes one.
        process: Start an interpreter, instead of calling the tool's main here.
        timeout: Seconds that the tool may take.

    Raises:
        TimeoutError, subprocess.TimeoutExpired: The tool took longer, here or in a process of its own.

    An exception that the tool lets through is raised here, unless it ran in a process of its own.
    """
    if process:
        command = [ROOT / name] if "/" in name else ["-m", "megatron_dms.cli", name]
        return run_python(*command, *words, cwd=cwd, env=env, timeout=timeout)
    with ExitStack() as undo:
        undo.enter_context(_process_state())
        out, error = undo.enter_context(_captured())
        undo.enter_context(_time_limit(name, timeout))
        sys.argv = [name, *map(str, words)]
        environment = _changed(os.environ, env)
        os.environ.clear()
        os.environ.update(environment)
        if cwd is not None:
            os.chdir(cwd)
        try:
            status = _exit_status(_script(name).main() if "/" in name else cli.main([name, *sys.argv[1:]]))
        except SystemExit as stop:
            status = _exit_status(stop.code)
        return Done(status, _written(out), _written(error))


def run_python(
    *words: object, cwd: Path | None = None, env: Mapping[str, str | None] | None = None, timeout: float = 120
) -> Done:
    """Run `python *words` to its end, with the package importable and `env` set in addition."""
    path = os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(ROOT))))
    environment = _changed({**os.environ, "PYTHONPATH": path}, env)
    command = [sys.executable, *map(str, words)]
    ended = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout, check=False
    )
    return Done(ended.returncode, ended.stdout, ended.stderr)


def _changed(environment: Mapping[str, str], changes: Mapping[str, str | None] | None) -> dict[str, str]:
    """Return the environment with some variables set, and with those that are None left out."""
    return {name: value for name, value in {**environment, **(changes or {})}.items() if value is not None}


def _script(name: str) -> Any:
    """Import a script by its path, anew for each call, as an interpreter would."""
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _exit_status(code: object) -> int:
    """Return the exit status that the interpreter makes of `sys.exit(code)`."""
    if isinstance(code, int):
        return int(code)
    if code is not None:
        print(code, file=sys.stderr)
    return int(code is not None)


@contextmanager
def _captured() -> Iterator[tuple[TextIO, TextIO]]:
    """Yield the files that take stdout and stderr, including the output of C code and of child processes."""
    with ExitStack() as undo:
        files = []
        for number, name in ((1, "stdout"), (2, "stderr")):
            getattr(sys, name).flush()
            file = undo.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8", buffering=1))
            kept = os.dup(number)
            undo.callback(os.close, kept)
            undo.callback(os.dup2, kept, number)
            os.dup2(file.fileno(), number)
            before = getattr(sys, name)
            undo.callback(setattr, sys, name, before)
            setattr(sys, name, file)
            for handler in _handlers_of(before, getattr(sys, f"__{name}__")):
                undo.callback(handler.setStream, handler.stream)
                handler.setStream(file)
            files.append(file)
        undo.enter_context(warnings.catch_warnings())
        _warn_as_an_interpreter(files[1])
        yield files[0], files[1]


def _handlers_of(*streams: TextIO | None) -> list[logging.StreamHandler]:
    """Return the log handlers that write to one of these streams, whichever library made them."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for logger in loggers for handler in getattr(logger, "handlers", [])]
    return [
        handler
        for handler in handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams
    ]


def _warn_as_an_interpreter(stream: TextIO) -> None:
    """Show warnings on a stream, and those only that an interpreter shows without options."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        stream.write(warnings.formatwarning(message, category, filename, lineno, line))

    warnings.showwarning = show
    warnings.resetwarnings()
    warnings.simplefilter("default")
    for hidden in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", hidden)


@contextmanager
def _time_limit(name: str, seconds: float) -> Iterator[None]:
    """Raise TimeoutError in the tool that is called here, after some seconds."""

    def late(number: int, frame: object) -> None:
        raise TimeoutError(f"{name} has not ended after {seconds:g} s")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _written(file: TextIO) -> str:
    """Return all that was written to a file."""
    file.flush()
    file.seek(0)
    return file.read()


@contextmanager
def _process_state() -> Iterator[None]:
    """Put back what a tool may change in the process, torch's settings included."""
    root_logger = logging.getLogger()
    argv, path, folder, environment = sys.argv, sys.path[:], Path.cwd(), dict(os.environ)
    level, handlers, disabled = root_logger.level, root_logger.handlers[:], root_logger.manager.disable
    actions = {number: signal.getsignal(number) for number in _SIGNALS}
    with ExitStack() as undo:
        undo.enter_context(warnings.catch_warnings())
        undo.enter_context(_torch_state())
        try:
            yield
        finally:
            sys.argv, sys.path[:] = argv, path
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            root_logger.setLevel(level)
            root_logger.handlers[:] = handlers
            logging.disable(disabled)
            for number, action in actions.items():
                signal.signal(number, action)


@contextmanager
def _torch_state() -> Iterator[None]:
    """Put back torch's threads, default type, random state and gradients, if torch is imported."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads, dtype, random = torch.get_num_threads(), torch.get_default_dtype(), torch.get_rng_state()
    gradients, exact = torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
        torch.set_rng_state(random)
        torch.set_grad_enabled(gradients)
        torch.use_deterministic_algorithms(exact)
