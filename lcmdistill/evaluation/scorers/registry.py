"""The scorers by their keys."""

from collections.abc import Mapping, Sequence

from lcmdistill.evaluation.scorers.aesthetic import AESTHETIC
from lcmdistill.evaluation.scorers.base import Scorer
from lcmdistill.evaluation.scorers.clip import CLIP, CLIP_DMD2
from lcmdistill.evaluation.scorers.hpsv2 import HPSV2
from lcmdistill.evaluation.scorers.image_reward import IMAGE_REWARD
from lcmdistill.evaluation.scorers.pickscore import PICKSCORE
from lcmdistill.utils.errors import UsageError

SCORERS: dict[str, Scorer] = {
    scorer.key: scorer for scorer in (CLIP, CLIP_DMD2, PICKSCORE, HPSV2, IMAGE_REWARD, AESTHETIC)
}


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
