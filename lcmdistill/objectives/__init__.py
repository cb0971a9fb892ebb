"""The training objectives, one file per paper."""

from typing import Any

from lcmdistill.objectives.cd import ConsistencyDistillation
from lcmdistill.objectives.ct import ConsistencyTraining, ImprovedConsistencyTraining
from lcmdistill.objectives.lcf import LatentConsistencyFineTuning
from lcmdistill.objectives.lcm import LatentConsistency
from lcmdistill.objectives.tcd import TrajectoryConsistency

OBJECTIVES: dict[str, type[Any]] = {
    "lcm": LatentConsistency,
    "lcf": LatentConsistencyFineTuning,
    "tcd": TrajectoryConsistency,
    "cd": ConsistencyDistillation,
    "ct": ConsistencyTraining,
    "ict": ImprovedConsistencyTraining,
}
