"""The compression ratio that training asks for at each step (DMS paper, section 3)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CompressionSchedule:
    """The target compression ratio by retrofit step; step 0 is the first step that compresses."""

    final_cr: float
    """The compression ratio that is reached and then held, >= 1."""
    steps_per_cr: float
    """Retrofit steps for each unit of CR, > 0."""
    anneal: str = "cr"
    """'cr': the CR grows linearly; 'fraction': the evicted fraction grows linearly, in the same number of
    steps."""

    @property
    def steps(self) -> float:
        """Retrofit steps until final_cr is asked for."""
        return self.steps_per_cr * (self.final_cr - 1)

    def target_cr(self, step: float) -> float:
        """The compression ratio asked for at `step`."""
        if self.anneal == "fraction":
            return 1 / (1 - self.target_fraction(step))
        return min(self.final_cr, 1 + max(step, 0) / self.steps_per_cr)

    def target_fraction(self, step: float) -> float:
        """alpha*, the mean evicted fraction asked for at `step`: 1 - 1/CR."""
        if self.anneal == "fraction":
            progress = min(1.0, max(step, 0) / self.steps) if self.steps else 1.0
            return progress * (1 - 1 / self.final_cr)
        return 1 - 1 / self.target_cr(step)

    def step_of(self, cr: float) -> int:
        """The first step that asks for at least `cr`; a checkpoint of this step is the model for `cr`.

        Raises:
            ValueError: the schedule never asks for `cr`.
        """
        if not 1 <= cr <= self.final_cr:
            raise ValueError(f"CR {cr} is never asked for: the schedule runs from 1 to {self.final_cr}")
        if self.anneal == "fraction":
            share = (1 - 1 / cr) / (1 - 1 / self.final_cr) if self.final_cr > 1 else 0.0
            return math.ceil(self.steps * share - 1e-9)
        return math.ceil(self.steps_per_cr * (cr - 1) - 1e-9)
