"""Published evaluation protocols, so that one's own numbers stand next to published tables. No torch here.

A protocol names prompts, number and size of images, steps, features and metrics. Its files are the user's. Each is
searched in the protocol's folder of the cache, unless an option names another place.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class NeededFile:
    """A file or folder that a protocol needs.

    Attributes:
        name: Its name in the protocol's folder.
        option: The option that names another place.
        content: What it is, and where it is published.
    """

    name: str
    option: str
    content: str


@dataclass(frozen=True)
class Protocol:
    """How a published table was measured.

    Attributes:
        key: The name in `--protocol`.
        source: The publication.
        num_images: The number of images, one per prompt.
        resolution: The side of the images in pixels.
        steps: The step counts of the table.
        prompts: The prompts.
        inception: The network of FID.
        real: The real images that FID compares with; None for the teacher's own images.
        fid_side: The side to which FID reduces whole images before Inception's 299 px; None if it does not.
        scorers: The scorers of the table, with the hub ids of their weights.
        teacher: How the teacher's images of the table were generated.
        assumptions: What the publication leaves open, and what is done here.
    """

    key: str
    source: str
    num_images: int
    resolution: int
    steps: tuple[int, ...]
    prompts: NeededFile
    inception: NeededFile
    real: NeededFile | None
    fid_side: int | None
    scorers: Mapping[str, str]
    teacher: str
    assumptions: tuple[str, ...] = ()


@dataclass(frozen=True)
class PublishedRun:
    """A protocol with the files that were found.

    Attributes:
        protocol: The protocol.
        inception: The network of FID; None if there are too few images for FID.
        real: The data source of real images; None without one.
        own: The options with which the command replaced the protocol's files.
    """

    protocol: Protocol
    inception: Path | None = None
    real: str | None = None
    own: tuple[str, ...] = field(default=())


INCEPTION = NeededFile(
    "inception-2015-12-05.pt",
    "--inception",
    "the TorchScript file of StyleGAN3's metrics, which clean-fid also uses",
)

CLIP_G = "laion/CLIP-ViT-g-14-laion2B-s12B-b42K"

PROTOCOLS: dict[str, Protocol] = {
    protocol.key: protocol
    for protocol in (
        Protocol(
            key="coco10k-dmd2",
            source="DMD2 (Yin et al. 2024, arXiv:2405.14867), as its repository evaluates SDXL",
            num_images=10_000,
            resolution=1024,
            steps=(4,),
            prompts=NeededFile(
                "prompts.txt",
                "--prompts",
                "the 10,000 captions of all_prompts.pkl in coco10k.zip (hub: tianweiy/DMD2, data/coco), as text with one per "
                "line, since pickles are not executed",
            ),
            inception=INCEPTION,
            real=NeededFile("real", "--real", "the folder subset of coco10k.zip"),
            fid_side=512,
            scorers={"clip_dmd2": CLIP_G, "imagereward": "THUDM/ImageReward"},
            teacher="50 steps at guidance scale 6",
        ),
        Protocol(
            key="coco5k-senseflow",
            source="SenseFlow (Ge et al. 2025, arXiv:2506.00523), table 1",
            num_images=5_000,
            resolution=1024,
            steps=(4,),
            prompts=NeededFile(
                "prompts.txt",
                "--prompts",
                "one caption for each of the 5,000 images of COCO's val2017 (captions_val2017.json), one per line",
            ),
            inception=INCEPTION,
            real=None,
            fid_side=None,
            scorers={
                "clip_dmd2": CLIP_G,
                "hpsv2": "xswu/HPSv2",
                "pickscore": "yuvalkirstain/PickScore_v1",
                "imagereward": "THUDM/ImageReward",
            },
            teacher="80 network evaluations for SDXL and 100 for SD 3.5 Large, that is 40 and 50 guided steps",
            assumptions=(
                "its repository has no evaluation code: the choice of captions, FID's resizing (here clean-fid's), the CLIP "
                "model (here DMD2's) and the version of HPSv2 are assumed",
            ),
        ),
    )
}


def deviations(
    run: PublishedRun, *, images: int, prompts: int, resolution: int, steps: tuple[int, ...], teacher: str
) -> tuple[str, ...]:
    """Return how an evaluation differs from its protocol, one clause each.

    Args:
        run: The protocol and its files.
        images: The number of images per point.
        prompts: The number of distinct prompts.
        resolution: The side of the images in pixels.
        steps: The step counts.
        teacher: How the teacher's images were generated.
    """
    protocol, texts = run.protocol, []
    if images != protocol.num_images:
        without = ", so there is no FID" if images < protocol.num_images else ""
        texts.append(f"{images:,} images instead of {protocol.num_images:,}{without}")
    if prompts < min(images, protocol.num_images):
        texts.append(f"{prompts:,} distinct prompts")
    if resolution != protocol.resolution:
        texts.append(f"{resolution} px instead of {protocol.resolution} px")
    if not set(steps) & set(protocol.steps):
        texts.append(f"steps {_listed(steps)} instead of {_listed(protocol.steps)}")
    if run.own:
        texts.append(f"files of {', '.join(run.own)} instead of the protocol's")
    texts.append(f"the teacher's images with {teacher} instead of {protocol.teacher}")
    texts.append("start noise of other seeds")
    return (*texts, *protocol.assumptions)


def _listed(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
