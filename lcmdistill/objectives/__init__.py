"""The training objectives, one file per paper. OBJECTIVES is the one place that lists them."""

from typing import TYPE_CHECKING

from lcmdistill.utils.registry import LazyRegistry

if TYPE_CHECKING:
    from lcmdistill.objectives.base import MethodInfo

OBJECTIVES = LazyRegistry(
    {
        "lcm": "lcmdistill.objectives.lcm:LatentConsistency",
        "lcf": "lcmdistill.objectives.lcf:LatentConsistencyFineTuning",
        "tcd": "lcmdistill.objectives.tcd:TrajectoryConsistency",
        "cd": "lcmdistill.objectives.cd:ConsistencyDistillation",
        "ct": "lcmdistill.objectives.ct:ConsistencyTraining",
        "pcm": "lcmdistill.objectives.pcm:PhasedConsistency",
        "tdm": "lcmdistill.objectives.tdm:TrajectoryDistributionMatching",
        "ict": "lcmdistill.objectives.ct:ImprovedConsistencyTraining",
        "ect": "lcmdistill.objectives.ect:EasyConsistencyTuning",
    }
)


def method_sampled_by(scheduler: str) -> "MethodInfo | None":
    """Return a method whose students a diffusers scheduler class marks; None if it marks none, because teachers have it."""
    methods = (info for each in OBJECTIVES.values() for info in (each.info, each.info.on_flow()))
    return next((info for info in methods if info.scheduler == scheduler and not info.deterministic), None)


def flow_scheduler_of(scheduler: str) -> str:
    """Return the scheduler class that samples students of flow-matching teachers, for the one of other teachers' students."""
    methods = (each.info for each in OBJECTIVES.values())
    return next((info.on_flow().scheduler for info in methods if info.scheduler == scheduler), scheduler)
