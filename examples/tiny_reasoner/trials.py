"""The retrofits of the tiny reasoner that the claims need, each with several seeds.

A trial is trained and measured once, and its folder WORK/NAME-seedN keeps the checkpoints, the log, the
exports and measured.json. Whatever is in the folder is not done again, and training goes on at the last
checkpoint. A folder also keeps its settings and refuses other settings.
"""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from run_retrofit import ROOT, Retrofit, export, python, tokenize, train

from megatron_dms.files import write_durably

HERE = Path(__file__).resolve().parent
BASE = HERE / "hard_base"
DIFFICULTY: dict[str, Any] = {"min_lines": 8, "max_lines": 12, "operands": 3}
TRAIN_PROBLEMS = 4000
HELDOUT_SEED = 1000

WINDOW = 16
STANDARD = Retrofit(zeroing_steps=60, steps_per_cr=30, window=WINDOW, batch=8, sequence=272)
# 13 times the tokens per unit of CR, and enough problems that few are seen twice.
LONG = STANDARD.having(zeroing_steps=200, steps_per_cr=400, batch=16)
LONG_PROBLEMS = 40_000
LINEAR = {"--dms-predictor": "linear"}
MERGE = {"--dms-method": "merge", "--dms-predictor": "key_channel"}
LADDER, ENDS = (2, 4, 6, 8), (4, 8)


@dataclass(frozen=True)
class Trial:
    """One setting of a retrofit."""

    retrofit: Retrofit
    crs: tuple[int, ...] = ENDS
    """The compression ratios of the ladder that are measured."""
    train_problems: int = TRAIN_PROBLEMS
    """How many problems the retrofit is trained on."""

    @property
    def merges(self) -> bool:
        """Whether the method is DMC."""
        return "--dms-method" in self.retrofit.flags


TRIALS = {
    "dms": Trial(STANDARD, LADDER),
    "immediate": Trial(STANDARD.having(flags={"--dms-lag": WINDOW}), LADDER),
    "dmc-10": Trial(STANDARD.having(steps_per_cr=10, window=0, flags=MERGE)),
    "dmc-30": Trial(STANDARD.having(window=0, flags=MERGE)),
    "dmc-60": Trial(STANDARD.having(steps_per_cr=60, window=0, flags=MERGE)),
    "steps-10": Trial(STANDARD.having(steps_per_cr=10)),
    "steps-60": Trial(STANDARD.having(steps_per_cr=60)),
    "key-channel": Trial(STANDARD.having(flags={"--dms-predictor": "key_channel"})),
    "linear": Trial(STANDARD.having(zeroing_steps=0, flags=LINEAR)),
    "linear-only": Trial(STANDARD.having(zeroing_steps=0, flags={**LINEAR, "--dms-train": "predictor"})),
    "lag-0": Trial(STANDARD.having(flags={"--dms-lag": 0})),
    "window-4": Trial(STANDARD.having(window=4)),
    "window-64": Trial(STANDARD.having(window=64)),
    "kl-student-teacher": Trial(STANDARD.having(flags={"--dms-kl": "student_teacher"})),
}
LONG_TRIALS = {
    "long-4": Trial(LONG.having(final_cr=4), (2, 3, 4), LONG_PROBLEMS),
    "long-8": Trial(LONG, (2, 4, 6, 8), LONG_PROBLEMS),
}
"""Retrofits that take an hour or more each: their students can regain the accuracy of their teacher."""


def prepare(work: Path, trials: Iterable[Trial]) -> None:
    """Make the training tokens and the base model in Megatron's format, once for all trials."""
    work.mkdir(parents=True, exist_ok=True)
    for count in sorted({trial.train_problems for trial in trials}):
        data = _data_prefix(work, count)
        if not data.with_suffix(".idx").exists():
            tokenize(BASE, data, "train", count, seed=1, difficulty=_difficulty_flags())
    if not (work / "base").exists():
        python(ROOT / "tools/convert.py", "import", "--hf", BASE, "--megatron", work / "base")


def _data_prefix(work: Path, count: int) -> Path:
    return work / ("train" if count == TRAIN_PROBLEMS else f"train-{count}")


def trial_of(name: str) -> Trial:
    """Return the trial with this name, short or long."""
    return (TRIALS | LONG_TRIALS)[name]


def problems_file(work: Path, count: int) -> Path:
    """Write the first held-out problems as JSONL."""
    path = work / f"heldout-{count}.jsonl"
    write_durably(path, "".join(json.dumps(problem) + "\n" for problem in heldout_set(count)))
    return path


def _difficulty_flags() -> list[object]:
    return [word for name, value in DIFFICULTY.items() for word in (f"--{name.replace('_', '-')}", value)]


def run_trials(
    names: Sequence[str],
    seeds: Sequence[int],
    work: Path,
    problems: int,
    jobs: int,
    say: Callable[[str], None],
) -> dict[str, list[dict[str, Any]]]:
    """Train and measure, `jobs` trials at a time; all trials with one seed come before the next seed.

    Returns:
        for each name one entry for each seed: {"seed", "crs": {"4": figures of compare.measure_model and
        "training_tokens"}}.
    """
    prepare(work, map(trial_of, names))
    wanted = [(name, seed) for seed in seeds for name in names]
    for key in wanted:  # a folder with other settings is refused before hours of work
        _settle_trial(*key, work, problems)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    begin = time.monotonic()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = {pool.submit(run_trial, *key, work, problems): key for key in wanted}
        try:
            for future in as_completed(running):
                name, seed = running[future]
                found[name, seed] = future.result()
                figures = ", ".join(
                    f"CR {cr}: {100 * row['accuracy']:.1f} % at {row['achieved_cr']:.2f}"
                    for cr, row in found[name, seed]["crs"].items()
                )
                seconds = time.monotonic() - begin
                say(f"{len(found)} of {len(wanted)}, {seconds:.0f} s: {name}, seed {seed}: {figures}")
        except BaseException:
            # Otherwise the error would show only after hours of other trials.
            pool.shutdown(cancel_futures=True)
            raise
    return {name: [found[name, seed] for seed in seeds] for name in names}


def run_trial(name: str, seed: int, work: Path, problems: int) -> dict[str, Any]:
    """Run one trial with one seed, and go on where an earlier call stopped.

    Raises:
        ValueError: the trial's folder was made with other settings.
    """
    trial = trial_of(name)
    folder, retrofit = _settle_trial(name, seed, work, problems)
    measured = folder / "measured.json"
    if measured.exists():
        return json.loads(measured.read_text())
    data = _data_prefix(work, trial.train_problems)
    train(retrofit, work / "base", data, folder / "run", folder / "log.txt")
    rows = {}
    for cr in trial.crs:
        export(folder / "run", retrofit.step_of(cr), folder / f"cr{cr}")
        tokens = retrofit.step_of(cr) * retrofit.batch * retrofit.sequence
        rows[str(cr)] = {"training_tokens": tokens, **_measure(folder / f"cr{cr}", trial.merges, problems)}
    result = {"seed": seed, "crs": rows}
    write_json(measured, result)
    return result


def measure_teacher(work: Path, problems: int) -> dict[str, float]:
    """Return the figures of the base model.

    Raises:
        ValueError: the figures were measured with other settings.
    """
    from compare import measure_folder

    work.mkdir(parents=True, exist_ok=True)
    _settle(work / "teacher_settings.json", {**DIFFICULTY, "problems": problems})
    measured = work / "teacher.json"
    if not measured.exists():
        write_json(measured, measure_folder(BASE, heldout_set(problems)))
    return json.loads(measured.read_text())


def _settle_trial(name: str, seed: int, work: Path, problems: int) -> tuple[Path, Retrofit]:
    """Return the trial's folder and settings; from now on the folder belongs to this trial."""
    retrofit = trial_of(name).retrofit.having(seed=seed)
    folder = work / f"{name}-seed{seed}"
    folder.mkdir(exist_ok=True)
    _settle(folder / "settings.json", {**asdict(retrofit), "problems": problems})
    return folder, retrofit


def _measure(folder: Path, merges: bool, problems: int) -> dict[str, float]:
    import torch
    from compare import measure_folder, measure_model

    torch.set_num_threads(1)
    heldout = heldout_set(problems)
    if not merges:
        return measure_folder(folder, heldout)
    from megatron_dms.inference.dmc_model import load_dmc
    from megatron_dms.inference.loading import load_tokenizer

    return measure_model(load_dmc(folder, "float32", "cpu"), load_tokenizer(folder), heldout)


def heldout_set(count: int) -> list[dict[str, Any]]:
    """Return the problems that everything is measured on."""
    from measure import heldout_problems
    from problems import Difficulty

    return heldout_problems(count, HELDOUT_SEED, Difficulty(**DIFFICULTY))


def _settle(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        write_json(path, settings)
    elif json.loads(path.read_text()) != json.loads(json.dumps(settings)):
        raise ValueError(f"{path} says other settings than the trial's of today; choose another --work")


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see either the old content or the new."""
    write_durably(path, json.dumps(value, indent=1) + "\n")
