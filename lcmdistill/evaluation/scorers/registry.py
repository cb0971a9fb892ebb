"""The scorers by their keys."""

from collections.abc import Mapping, Sequence

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.registry import LazyRegistry

SCORERS = LazyRegistry(
    {
        "clip": "lcmdistill.evaluation.scorers.clip:CLIP",
        "clip_dmd2": "lcmdistill.evaluation.scorers.clip:CLIP_DMD2",
        "pickscore": "lcmdistill.evaluation.scorers.pickscore:PICKSCORE",
        "hpsv2": "lcmdistill.evaluation.scorers.hpsv2:HPSV2",
        "imagereward": "lcmdistill.evaluation.scorers.image_reward:IMAGE_REWARD",
        "aesthetic": "lcmdistill.evaluation.scorers.aesthetic:AESTHETIC",
    }
)


def parse_scorers(words: Sequence[str]) -> Mapping[str, str]:
    """Return {scorer: weights} of `NAME=MODEL` words.

    Raises:
        UsageError: A word has no name, an unknown one, or one that another word has.
    """
    chosen: dict[str, str] = {}
    for word in words:
        name, separator, weights = word.partition("=")
        if not separator or name not in SCORERS or not weights:
            raise UsageError(
                f"--scorer {word} must be NAME=MODEL, where NAME is one of {', '.join(SCORERS)} and MODEL is a local path or "
                "a cached hub id"
            )
        if name in chosen:
            raise UsageError(f"--scorer {name} is specified twice; specify each scorer once")
        chosen[name] = weights
    return chosen
