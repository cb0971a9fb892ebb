"""The configuration: what wins over what, what is refused and how, and the way to TOML and back."""

import inspect
import re
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w

from lcmdistill import cli
from lcmdistill.cli._options import SETTINGS
from lcmdistill.config.defaults import ALIAS_DEFAULTS
from lcmdistill.config.resolve import parse_assignment
from lcmdistill.config.schema import RunConfig
from lcmdistill.config.toml import flatten, read_toml, to_toml
from lcmdistill.diffusion import SOLVERS
from lcmdistill.export import EXPORTERS
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.utils.errors import UsageError
from tests.support.runs import resolve

# A key that is renamed or removed breaks users' config files and their runs' resuming: change this list knowingly.
KEYS = """
data.buckets data.cache data.cache_dir data.cache_limit data.caption_drop data.max_samples data.crop data.teacher_steps
data.flip
data.guidance_scale data.holdout data.max_watermark data.min_size data.prompts data.resolution data.sources
data.teacher_cache_samples data.trajectory
objective.distance objective.ema_decay objective.guidance objective.name objective.skip objective.solver objective.times
objective.w_max objective.w_min
optim.gradient_accumulation_steps optim.adam_eps optim.batch_size optim.beta1 optim.beta2 optim.learning_rate optim.lr_scheduler
optim.max_grad_norm optim.max_train_steps optim.optimizer optim.warmup_steps optim.weight_decay
run.best_metric run.checkpoint_every run.compile run.device run.gradient_checkpointing run.keep_checkpoints run.log_every
run.hub_private run.memory run.output run.precision run.profile run.push_to_hub run.report_to run.seed
run.shard run.validate_every
run.validation_guidance_scale run.validation_prompts
student.alpha student.dropout student.kind student.offload_target student.omega_init student.quantize_base student.rank
student.start student.target
student.target_modules
student.lora_relative_to teacher.loras teacher.lora_checksums
teacher.allow_pickle teacher.clip_skip teacher.drop teacher.model teacher.prediction_type teacher.revision teacher.vae
teacher.vae_dtype teacher.vae_tiling teacher.variant
"""


def value(config: RunConfig, dotted: str) -> Any:
    return flatten(config).get(dotted)


def test_the_option_list_is_frozen() -> None:
    optional = {"teacher.revision": "a", "teacher.variant": "a", "data.prompts": "a", "data.max_samples": 1}
    optional |= {"data.max_watermark": 0.5, "data.cache_dir": "a", "run.validation_guidance_scale": 1.0}
    optional |= {
        "run.push_to_hub": "a/b",
        "teacher.prediction_type": "epsilon",
        "teacher.vae": "a",
        "teacher.loras": ("a.safetensors",),
        "teacher.lora_checksums": ("0",),
        "data.buckets": ("auto",),
        "teacher.clip_skip": 1,
        "teacher.drop": ("safety_checker",),
    }
    assert sorted(flatten(resolve({}, optional))) == sorted(KEYS.split())


def test_registries_name_what_they_load() -> None:
    assert [OBJECTIVES[name].info.key for name in OBJECTIVES] == list(OBJECTIVES)
    assert all(callable(SOLVERS[name]) for name in SOLVERS)
    assert [EXPORTERS[name].key for name in EXPORTERS] == list(EXPORTERS)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_with_a_solver_takes_every_solver(objective: str, solver: str) -> None:
    flags = {"objective.name": objective, "objective.solver": solver}
    if objective in ("lcf", "ct", "ict", "ect", "tdm"):
        with pytest.raises(UsageError, match=rf"objective\.solver is not a setting of {objective}, which has "):
            resolve({}, flags)
        return
    config = resolve({}, flags)
    assert type(config.objective) is OBJECTIVES[objective]
    config.objective.check(1000)


def test_without_guidance_some_captions_are_dropped() -> None:
    key = "data.caption_drop"
    assert value(resolve({}, {}), key) == 0
    assert value(resolve({}, {"objective.name": "cd"}), key) == 0.1
    free = {"objective.name": "tcd", "objective.guidance": "free"}
    assert value(resolve({}, free), key) == 0.1
    assert value(resolve(free, {key: 0.3}), key) == 0.3
    with pytest.raises(UsageError, match="caption_drop is 0; set it to"):
        resolve(free, {key: 0})


def test_a_run_that_goes_on_from_another_starts_from_its_settings(tmp_path: Path) -> None:
    tree = {
        "teacher": {"model": "tiny"},
        "data": {"resolution": 32},
        "objective": {"name": "lcm", "w_min": 1.0, "w_max": 4.0},
        "optim": {"max_train_steps": 10},
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps(tree) + "# checksum: any\n")
    config = resolve({}, {"teacher.model": str(tmp_path), "objective.name": "lcf"})
    found = [
        value(config, key) for key in ("data.resolution", "objective.w_min", "objective.w_max", "optim.batch_size")
    ]
    assert found == [32, 1.0, 4.0, 32]


@pytest.mark.parametrize(
    ("recorded", "guidance"),
    [
        ({"objective": {"name": "lcm", "w_min": 5.0, "w_max": 15.0, "guidance": "baked"}}, "baked"),
        ({"objective": {"name": "lcm", "w_min": 5.0, "w_max": 15.0, "guidance": "free"}}, "free"),
        ({"objective": {"name": "cd"}}, "free"),
        ({"train": {"lr": 1}}, "baked"),  # another program's
    ],
)
@pytest.mark.parametrize("named", ["", "pipeline"])
def test_fine_tuning_leaves_guidance_as_a_run_has_it(
    tmp_path: Path, recorded: dict[str, Any], guidance: str, named: str
) -> None:
    run = {"teacher": {"model": "sd15"}, "optim": {"max_train_steps": 10}} if recorded else {}
    (tmp_path / "config.toml").write_text(tomli_w.dumps({**run, **recorded}) + "# checksum: any\n")
    config = resolve({}, {"teacher.model": str(tmp_path / named), "objective.name": "lcf"})
    assert value(config, "objective.guidance") == guidance
    assert value(config, "data.caption_drop") == (0.1 if guidance == "free" else 0.0)
    assert value(config, "data.sources") == ("teacher",)


def test_defaults_give_way_to_the_teacher_s_then_the_file_then_the_flags() -> None:
    key = "optim.learning_rate"
    assert value(resolve({}, {}), key) == 8e-6
    assert value(resolve({}, {"teacher.model": "tiny"}), key) == ALIAS_DEFAULTS["tiny"][key] != 8e-6
    assert value(resolve({"teacher.model": "tiny", key: 3e-5}, {}), key) == 3e-5
    assert value(resolve({"teacher.model": "tiny", key: 3e-5}, {key: 7e-5}), key) == 7e-5
    # what the file leaves open is still the teacher's
    assert value(resolve({"teacher.model": "tiny", key: 3e-5}, {}), "data.resolution") == 64
    # the flag's teacher decides, not the file's
    assert value(resolve({"teacher.model": "tiny"}, {"teacher.model": "a/b"}), key) == 8e-6


@pytest.mark.parametrize("alias", ALIAS_DEFAULTS)
def test_the_teachers_defaults_are_known_keys(alias: str) -> None:
    config = resolve({}, {"teacher.model": alias})
    for key, expected in ALIAS_DEFAULTS[alias].items():
        assert value(config, key) == expected, key


def test_the_output_is_named_for_the_teacher_and_the_objective() -> None:
    assert value(resolve({}, {"teacher.model": "tiny"}), "run.output") == str(Path("runs/tiny-lcm"))
    assert value(resolve({}, {"teacher.model": "owner/name"}), "run.output") == str(Path("runs/name-lcm"))
    assert value(resolve({}, {"run.output": "here"}), "run.output") == "here"


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("optim.learning_rat", "optim.learning_rate"),
        ("optim.lerning_rate", "optim.learning_rate"),
        ("run.learning_rate", "optim.learning_rate"),  # the right key in a wrong section
        ("objective.wmin", "objective.w_min"),
        ("optim.lr", "optim.learning_rate"),  # initials
        ("runs.seed", "run.seed"),
        ("learning_rate", "optim.learning_rate"),  # no section
        ("network_dim", "student.rank"),  # another program's word
    ],
)
def test_an_unknown_key_is_refused_with_the_closest_one(key: str, near: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"unknown setting {key!r}; did you mean {near!r}?")):
        resolve({key: 1}, {})
    with pytest.raises(UsageError, match=re.escape(repr(near))):
        resolve({}, {key: 1})


def test_a_key_like_no_other_is_answered_with_the_sections() -> None:
    with pytest.raises(UsageError, match="sections are data, objective, optim, run, student, teacher"):
        resolve({"qqqq.zzzz": 1}, {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("optim.batch_size=1.5", "optim.batch_size is 1.5; it must be a whole number"),
        ("optim.batch_size=true", "optim.batch_size is True; it must be a whole number"),
        ("optim.batch_size=four", "optim.batch_size is 'four'; it must be a whole number"),
        ("optim.batch_size=0", "optim.batch_size is 0; it must be from 1 to 65536"),
        ("optim.gradient_accumulation_steps=-1", "optim.gradient_accumulation_steps is -1; it must be from 1 to 65536"),
        ("optim.max_train_steps=0", "optim.max_train_steps is 0; it must be at least 1"),
        (f"optim.max_train_steps={10**30}", f"optim.max_train_steps is {10**30}; it must be at most 1000000000"),
        (f"run.seed={'1' * 40}", f"run.seed is {'1' * 40}; it must be from 0 to {2**63 - 1}"),
        (f"run.seed={'1' * 9999}", f"run.seed is '{'1' * 9999}'; it must be a whole number"),
        (f"objective.skip={10**20}", f"objective.skip is {10**20}; it must be at most 1000000000"),
        ("optim.learning_rate=fast", "optim.learning_rate is 'fast'; it must be a number"),
        ("optim.learning_rate=-1e-3", "optim.learning_rate is -0.001"),
        ("optim.learning_rate=nan", "optim.learning_rate is nan; it must be a finite number"),
        ("optim.adam_eps=inf", "optim.adam_eps is inf; it must be a finite number"),
        ("optim.beta1=1.0", "optim.beta1 is 1.0"),
        ("optim.beta2=-0.1", "optim.beta2 is -0.1"),
        ("optim.lr_scheduler=step", "optim.lr_scheduler is 'step'; choose from constant, cosine, linear"),
        ("objective.w_max=inf", "objective.w_max is inf; it must be a finite number"),
        ("objective.name=dmd", "objective.name is 'dmd'; choose from lcm"),
        ("objective.times=some", "objective.times is 'some'; choose from grid, all"),
        ("data.flip=perhaps", "data.flip is 'perhaps'; it must be true or false"),
        ("data.crop=left", "data.crop is 'left'; choose from center, random"),
        ("data.caption_drop=1.5", "data.caption_drop is 1.5; it must be from 0 to 1"),
        ("data.max_samples=0", "data.max_samples is 0; it must be at least 1"),
        ("data.cache_limit=-1", "data.cache_limit is -1.0; it must be at least 0"),
        ("data.min_size=-1", "data.min_size is -1; it must be at least 0"),
        ("data.sources=[1, 2]", "data.sources is [1, 2]; it must be a list of strings"),
        ("data.sources=[]", "data.sources is empty"),
        ("run.memory=lots", "run.memory is 'lots'; it must be auto, off, or a number of GiB"),
        ("run.memory=0", "run.memory is '0'; it must be auto"),
        ("optim.optimizer=sgd", "optim.optimizer is 'sgd'; choose from adamw, adamw8bit"),
        ("run.precision=fp8", "run.precision is 'fp8'; choose from auto, fp32, bf16, fp16"),
        ("run.report_to=paper", "run.report_to is 'paper'; choose from none, tensorboard, wandb"),
        ("run.seed=-1", "run.seed is -1; it must be from 0 to"),
        ("run.validate_every=-1", "run.validate_every is -1; it must be at least 0"),
        ("student.rank=0", "student.rank is 0; it must be from 1 to 16384"),
        ("student.dropout=1.0", "student.dropout is 1.0; it must be at least 0 and below 1"),
        ("student.alpha=0", "student.alpha is 0; it must be above 0"),
        ("student.alpha=-4", "student.alpha is -4; it must be above 0"),
        ("student.target=none", "student.target is 'none'; choose from live, ema"),
        ("teacher.model=true", "teacher.model is True; it must be a string"),
    ],
)
def test_a_wrong_value_is_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        resolve({}, dict([parse_assignment(text)]))
    assert str(caught.value).startswith(message)


def test_a_command_is_taken_from_the_command_line_only() -> None:
    pipe = {"data.sources": ["tiny", "pipe:cat a.tar"]}
    with pytest.raises(
        UsageError, match=r"a shell command \(pipe:\.\.\.\) is not taken from a file; pass it as --data"
    ):
        resolve(pipe, {})
    with pytest.raises(UsageError, match="not taken from a file"):
        resolve({"data.sources": "pipe:cat a.tar"}, {"run.seed": 1})
    assert resolve({"data.sources": ["tiny"]}, pipe).data.sources == ("tiny", "pipe:cat a.tar")
    assert resolve({}, dict([parse_assignment("data.sources=pipe:cat a.tar")])).data.sources == ("pipe:cat a.tar",)


def test_prompts_are_for_the_teacher_s_own_images() -> None:
    with pytest.raises(UsageError, match="--prompts is for --data teacher, and the data are tiny, a; add --data"):
        resolve({}, {"data.prompts": "mine.txt", "data.sources": ["tiny", "a"]})
    with pytest.raises(UsageError, match="the data are tiny; add"):
        resolve({}, {"data.prompts": "mine.txt", "teacher.model": "tiny"})
    assert resolve({}, {"data.prompts": "mine.txt", "data.sources": ["tiny", "teacher"]}).data.prompts == "mine.txt"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim.learning_rate=1e-5", 1e-5),
        ("optim.learning_rate=1", 1.0),
        ("data.flip=true", True),
        ("data.flip=True", True),
        ("data.max_samples=none", None),
        ("data.sources=teacher", ("teacher",)),
        ('data.sources=["tiny", "teacher"]', ("tiny", "teacher")),
        ("run.device=cuda:1", "cuda:1"),
        ("run.output=a=b", "a=b"),
        ("teacher.model=owner/name", "owner/name"),
        ("teacher.revision=3", "3"),
    ],
)
def test_an_assignment_is_read_as_the_field_s_type(text: str, expected: Any) -> None:
    key, raw = parse_assignment(text)
    found = value(resolve({}, {key: raw}), key)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize("text", ["optim.learning_rate", ""])
def test_what_is_no_assignment_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"section\.key=value"):
        parse_assignment(text)


@pytest.mark.parametrize(
    "flags",
    [{}, {"teacher.model": "tiny"}, {"teacher.model": "sd21", "objective.solver": "euler"}, {"student.kind": "lora"}],
)
def test_the_toml_of_a_configuration_reads_back_to_the_same(tmp_path: Path, flags: dict[str, Any]) -> None:
    odd = {
        "data.prompts": 'a "quoted"\\path\n',
        "data.sources": ("teacher", "a,b"),
        "run.validation_prompts": ("x", "é"),
    }
    odd |= {"optim.adam_eps": 1e-20, "data.max_watermark": 0.5, "data.max_samples": 7, "run.precision": "bf16"}
    for config in (resolve({}, flags), resolve({}, {**odd, **flags})):
        path = tmp_path / "config.toml"
        path.write_text(to_toml(config), encoding="utf-8")
        assert resolve(read_toml(path), {}) == config


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[optim\n", "is not valid TOML"),
        (b"\xff\xfe", "is not valid TOML"),
        (b"seed = 1\n", "'seed' is outside a section"),
        (b"[optim.sub]\nx = 1\n", r"\[optim\.sub\] is a table in a table; sections are not nested"),
        (None, "cannot be read"),
    ],
)
def test_a_config_file_that_is_none_is_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "config.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_toml(path)


# Told in words rather than values.
IN_WORDS = {
    "data": "teacher; tiny: tiny",
    "prompts": "a bundled list",
    "output": "runs/TEACHER-OBJECTIVE, with -lora for a LoRA",
    "prediction_type": "as its files state",
    "vae": "the teacher's own",
    "text_encoder": "the teacher's own",
    "base": "none",
    "buckets": "one square",
}

NO_VALUES = ("prompts", "prediction_type", "vae", "text_encoder", "base", "buckets")
"options whose default is None"

COMMANDS = {
    "distill": (cli.distill, {}, IN_WORDS),
    "distill-lora": (
        cli.distill_lora,
        {"student.kind": "lora"},
        {**IN_WORDS, "target_modules": "those of the published LCM-LoRAs"},
    ),
}


def documented_defaults(command: Any) -> dict[str, str]:
    """What --help says of each option's default."""
    found = {}
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        help_text = get_args(parameter.annotation)[-1].help or ""
        if match := re.search(r"\[default: (.*)\]$", help_text):
            found[name] = match[1]
    return found


EACH_DEFAULT = [
    (name, option)
    for name, (command, _, in_words) in COMMANDS.items()
    for option in sorted({*documented_defaults(command)} - {*in_words})
]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_help_tells_in_words_is_true(name: str) -> None:
    command, flags, in_words = COMMANDS[name]
    documented = documented_defaults(command)
    assert {option: documented[option] for option in in_words} == in_words
    assert value(resolve({}, flags), "data.sources") == ("teacher",)
    assert value(resolve({}, {**flags, "teacher.model": "tiny"}), "data.sources") == ("tiny",)
    assert value(resolve({}, flags), "data.prompts") is None
    output = "runs/tiny-lcm" + "-lora" * (name == "distill-lora")
    assert value(resolve({}, {**flags, "teacher.model": "tiny"}), "run.output") == output


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_the_default_of_every_option_that_has_one(name: str) -> None:
    command, flags, _ = COMMANDS[name]
    config = resolve({}, flags)
    options = set(inspect.signature(command).parameters) & set(SETTINGS)
    values = {option: value(config, SETTINGS[option]) for option in options}
    with_default = {option for option, each in values.items() if each is not None and each is not False}  # not flags
    assert set(documented_defaults(command)) == with_default | set(NO_VALUES)


@pytest.mark.parametrize(("name", "option"), EACH_DEFAULT)
def test_the_defaults_that_help_tells_are_the_real_ones(name: str, option: str) -> None:
    command, flags, _ = COMMANDS[name]
    key, documented = SETTINGS[option], documented_defaults(command)[option]
    usual, _, others = documented.partition("; ")
    exceptions = dict(pair.split(": ") for pair in others.split(", ") if pair)
    actual = value(resolve({}, flags), key)
    assert type(actual)(usual) == actual
    for alias in ALIAS_DEFAULTS if option != "teacher" else ():
        of_alias = value(resolve({}, {**flags, "teacher.model": alias}), key)
        assert type(of_alias)(exceptions.get(alias, usual)) == of_alias, alias
