"""Which training steps there are. A method names its own in `MethodInfo.train_step`."""

from lcmdistill.utils.registry import LazyRegistry

STEP_KINDS = LazyRegistry(
    {
        "consistency": "lcmdistill.training.train_step:ConsistencyStep",
        "distribution-matching": "lcmdistill.training.distribution_step:DistributionMatchingStep",
    }
)
