"""The training objectives, one file per paper. OBJECTIVES is the one place that lists them."""

from lcmdistill.utils.registry import LazyRegistry

OBJECTIVES = LazyRegistry(
    {
        "lcm": "lcmdistill.objectives.lcm:LatentConsistency",
        "lcf": "lcmdistill.objectives.lcf:LatentConsistencyFineTuning",
        "tcd": "lcmdistill.objectives.tcd:TrajectoryConsistency",
        "cd": "lcmdistill.objectives.cd:ConsistencyDistillation",
        "ct": "lcmdistill.objectives.ct:ConsistencyTraining",
        "ict": "lcmdistill.objectives.ct:ImprovedConsistencyTraining",
    }
)
