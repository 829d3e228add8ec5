"""When which compression ratio is asked for (DMS paper, section 3)."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class CompressionSchedule:
    """Target compression ratio as a function of the retrofit step (0 = the first step that compresses)."""

    final_cr: float
    """Compression ratio that is reached and then held, >= 1."""
    steps_per_cr: float
    """Retrofit steps for each unit of CR, > 0."""
    anneal: str = "cr"
    """'cr': CR grows linearly; 'fraction': the evicted fraction grows linearly, in as many steps."""

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
        """The first step at which at least `cr` is asked for. A checkpoint taken then is the model of it."""
        if not 1 <= cr <= self.final_cr:
            raise ValueError(f"CR {cr} is never asked for: the schedule runs from 1 to {self.final_cr}")
        if self.anneal == "fraction":
            share = (1 - 1 / cr) / (1 - 1 / self.final_cr) if self.final_cr > 1 else 0.0
            return math.ceil(self.steps * share - 1e-9)
        return math.ceil(self.steps_per_cr * (cr - 1) - 1e-9)
