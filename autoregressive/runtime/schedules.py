"""Numbers that follow a schedule over a run: the learning rate, and lambda where it changes.

Letters: n steps of the run, k a step, from 0, w steps of warm-up, p progress, 0 to 1.

    f(p) = 1                        constant
           1 - p                    linear
           (1 + cos(pi p)) / 2      cosine
"""

import bisect
import functools
import math
from dataclasses import dataclass
from fractions import Fraction

SCHEDULES = ("constant", "cosine", "linear")
MAX_DENOMINATOR = 10**6         # of fractions that a user means


def fall(first: float, last: float, schedule: str, progress: float) -> float:
    """Returns last + (first - last) f(progress), which is `first` if the schedule is constant.

    Args:
        first, last: values at progress 0 and 1.
        schedule: one of SCHEDULES.
        progress: 0 to 1.
    """
    if schedule == "constant":
        return first
    if schedule == "linear":
        return last + (first - last) * (1 - progress)
    return last + (first - last) * ((1 + math.cos(math.pi * progress)) / 2)


def whole_steps(fraction: float, num_steps: int) -> int:
    """Returns floor(fraction * num_steps), of the ratio of integers that the float stands for.

    In floats .29 * 100 lies below 29; and .8888889 means 8/9.
    """
    return math.floor(Fraction(fraction).limit_denominator(MAX_DENOMINATOR) * num_steps)


@dataclass(frozen=True)
class LearningRate:
    """The learning rate over a run: a linear warm-up, the peak, a fall at the end.

    Attributes:
        peak: the rate after the warm-up.
        schedule: one of SCHEDULES, of the fall.
        num_steps: n, length of the run.
        warmup: w.
        decay_from: fraction of the run, 0 to 1, after which it falls; not before the warm-up's end.
        least: the rate that it falls to.
    """

    peak: float
    schedule: str
    num_steps: int
    warmup: int = 0
    decay_from: float = 0.0
    least: float = 0.0

    @functools.cached_property          # every step asks for it
    def start(self) -> int:
        """The first step of the fall, the last of the peak."""
        return max(self.warmup, whole_steps(self.decay_from, self.num_steps))

    def at(self, step: int) -> float:
        """Returns the rate of a step, 0 .. num_steps - 1."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        if step < self.start:
            return self.peak
        progress = (step - self.start) / (self.num_steps - self.start)
        return fall(self.peak, self.least, self.schedule, progress)


@dataclass(frozen=True)
class StagedRate:
    """A learning rate that begins anew with each stage of a run.

    Attributes:
        rates: of each stage, over its own steps.
        ends: the step before which each stage ends, ascending.
    """

    rates: tuple[LearningRate, ...]
    ends: tuple[int, ...]

    def at(self, step: int) -> float:
        """Returns the rate of a step, 0 .. ends[-1] - 1."""
        stage = bisect.bisect_right(self.ends, step)
        first = self.ends[stage - 1] if stage else 0
        return self.rates[stage].at(step - first)
