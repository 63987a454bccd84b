"""How long attention takes: the clock, the device's rates, the check before the clock, and what is
timed (attention cores, whole networks).

Rows and cells are made of it in `mitaswap.studies.bench`.
"""

from mitaswap.benchmark.core import CoreShape, Setting, cast, core_runs, squarest
from mitaswap.benchmark.gate import Refused, Verdict, gate
from mitaswap.benchmark.model import Swaps, best_batch, finite, model_runs, place
from mitaswap.benchmark.rates import Rates, floor, measure_rates
from mitaswap.benchmark.timing import Effort, Failure, Times, attempt, in_turn

__all__ = [
    "CoreShape",
    "Effort",
    "Failure",
    "Rates",
    "Refused",
    "Setting",
    "Swaps",
    "Times",
    "Verdict",
    "attempt",
    "best_batch",
    "cast",
    "core_runs",
    "finite",
    "floor",
    "gate",
    "in_turn",
    "measure_rates",
    "model_runs",
    "place",
    "squarest",
]
