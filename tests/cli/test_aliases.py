"""Options and commands as other programs call them: accepted where they mean the same, explained where they do not."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import typer

from lcmdistill.cli import app
from lcmdistill.cli._aliases import translate
from lcmdistill.cli.sample import SchedulerName
from lcmdistill.config import explained, synonyms
from lcmdistill.config.reference import setting_keys
from lcmdistill.export import EXPORTERS
from lcmdistill.objectives import OBJECTIVES
from lcmdistill.utils.errors import UsageError
from tests.support.teachers import Command

COMMANDS: Any = typer.main.get_command(app)
SETTINGS = {
    key
    for section in ("teacher", "student", "objective", "data", "optim", "run")
    for key in setting_keys(section, OBJECTIVES.locations)
}


def read(line: str) -> list[str]:
    """Return the words of a command line after its aliases were replaced."""
    name, *arguments = line.split()
    return translate(arguments, COMMANDS.commands[name].params, f"lcmdistill {name}")


@pytest.mark.parametrize(
    ("typed", "read_as"),
    [
        ("--lr 1e-4", "--learning-rate 1e-4"),
        ("--learning_rate=1e-4", "--learning-rate=1e-4"),
        ("--model sd15", "--teacher sd15"),
        ("--pretrained-model-name-or-path a/b", "--teacher a/b"),
        ("--pretrained_model_name_or_path=a/b", "--teacher=a/b"),
        ("--pretrained_teacher_model a/b", "--teacher a/b"),
        ("--train-data-dir photos", "--data photos"),
        ("--instance_data_dir photos", "--data photos"),
        ("--gradient_accumulation_steps 4", "--gradient-accumulation-steps 4"),
        ("--train_batch_size 2", "--batch-size 2"),
        ("--mixed-precision bf16", "--precision bf16"),
        ("--mixed_precision=no", "--precision=fp32"),
        ("--fp16", "--precision=fp16"),
        ("--bf16", "--precision=bf16"),
        ("--output_dir runs/x", "--output runs/x"),
        ("--network-dim 32", "--rank 32"),
        ("--network_alpha 16", "--alpha 16"),
        ("--lora-rank 32", "--rank 32"),
        ("--log_with wandb", "--report-to wandb"),
        ("--hub_model_id me/x", "--push-to-hub me/x"),
        ("--max_steps 10 --dry_run", "--max-train-steps 10 --dry-run"),
        ("--prompts=--lr", "--prompts=--lr"),
        ("-o runs/x -m sd15", "--output runs/x --teacher sd15"),
        ("--resolution 512,512", "--resolution 512"),
        ("--enable_bucket --seed 3", "--buckets=auto --seed 3"),
        ("--torch_compile --fp16", "--compile=on --precision=fp16"),
        ("--v_parameterization", "--prediction-type=v_prediction"),
        ("--report_to wandb", "--report-to wandb"),
        ("--huggingface_repo_id me/x", "--push-to-hub me/x"),
        ("--set optim.beta1=0.9 -- --lr", "--set optim.beta1=0.9 -- --lr"),
    ],
)
def test_a_training_option_of_other_programs(typed: str, read_as: str) -> None:
    assert " ".join(read(f"distill-lora {typed}")) == read_as


@pytest.mark.parametrize(
    ("typed", "read_as"),
    [
        ("--num-inference-steps 4", "--steps 4"),
        ("--num_inference_steps=4", "--steps=4"),
        ("--cfg 1.5", "--guidance-scale 1.5"),
        ("--cfg_scale 1.5", "--guidance-scale 1.5"),
        ("--num_images_per_prompt 2", "--num-images 2"),
        ("--pretrained_model_name_or_path sd15", "--model sd15"),
        ("--bf16", "--precision=bf16"),
        ("--cpu", "--device=cpu"),
        ("--outdir x", "--output x"),
        ("-o x -n 4 -p cat", "--output x --num-images 4 --prompt cat"),
        ("-- --cfg", "-- --cfg"),
    ],
)
def test_a_sampling_option_of_other_programs(typed: str, read_as: str) -> None:
    assert " ".join(read(f"sample {typed}")) == read_as


@pytest.mark.parametrize("word", synonyms.SETTINGS)
def test_each_word_for_a_setting_is_accepted_or_explained(word: str) -> None:
    setting = synonyms.SETTINGS[word]
    assert setting in SETTINGS
    try:
        words = read(f"distill-lora --{word.replace('_', '-')} 7")
    except UsageError as error:
        assert f"; use --set {setting}=" in str(error) or word in explained.TRAINING  # noqa: PT017
    else:
        option, value = words
        assert option in {each for p in COMMANDS.commands["distill-lora"].params for each in p.opts}
        assert value == "7"


@pytest.mark.parametrize("word", synonyms.OPTIONS)
def test_each_word_for_an_option_is_one_of_some_command(word: str) -> None:
    inner = [each for c in COMMANDS.commands.values() for each in getattr(c, "commands", {}).values()]
    options = {each for c in (*COMMANDS.commands.values(), *inner) for p in c.params for each in p.opts}
    assert f"--{synonyms.OPTIONS[word].replace('_', '-')}" in options


@pytest.mark.parametrize("word", explained.TRAINING)
def test_each_explained_word_ends_in_its_explanation(word: str) -> None:
    with pytest.raises(UsageError, match=re.escape(f"has no option --{word}: {explained.TRAINING[word]}")):
        read(f"distill --{word} 1")


@pytest.mark.parametrize("word", {**explained.ELSEWHERE, **explained.EVERYWHERE})
def test_a_word_is_explained_by_commands_that_do_not_train(word: str) -> None:
    text = {**explained.ELSEWHERE, **explained.EVERYWHERE}[word]
    with pytest.raises(UsageError, match=re.escape(f"sample has no option --{word}: {text}")):
        read(f"sample --{word} 1")


@pytest.mark.parametrize(("option", "value"), explained.VALUES)
def test_each_explained_value_ends_in_its_explanation(option: str, value: str) -> None:
    with pytest.raises(UsageError, match=re.escape(explained.VALUES[option, value])):
        read(f"{'export' if option == 'format' else 'distill'} --{option}={value}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fast", "a", "cat"], "takes one MODEL, got 'fast' and 'a'; a prompt is --prompt TEXT"),
        (["a cat"], "there is no model 'a cat'; if it is a prompt, use --prompt 'a cat'"),
    ],
)
def test_a_prompt_without_its_option_is_recognized(words: list[str], message: str) -> None:
    parameters = COMMANDS.commands["sample"].params
    with pytest.raises(UsageError, match=message):
        translate(words, parameters, "lcmdistill sample")
    assert translate(["fast", "--prompt", "a cat"], parameters, "") == ["fast", "--prompt", "a cat"]


def test_samplers_are_read_as_other_programs_spell_them() -> None:
    typed = {word for option, word in synonyms.VALUES if option == "scheduler"}
    assert {"euler a", "dpmpp_2m", "lcm"} <= typed
    assert read("sample --sampler LCM") == ["--scheduler", "lcm"]
    assert {synonyms.VALUES["scheduler", word] for word in typed} <= {*get_args(SchedulerName)}


def test_formats_that_explanations_name_exist() -> None:
    named = {
        word for text in explained.FORMATS for word in re.findall(r"kohya|single-file|pipeline|diffusers-lora", text)
    }
    assert named <= {*EXPORTERS}
    assert {value for (option, _), value in synonyms.VALUES.items() if option == "format"} <= {*EXPORTERS}


# kohya's sd-scripts, diffusers' LCM scripts and OneTrainer: what their users have in their command lines.
@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("--max_train_epochs 10", "a run counts steps: --max-train-steps"),
        ("--save_every_n_epochs 1", "--set run.checkpoint_every=N"),
        ("--output_name fast", "--output runs/NAME"),
        ("--checkpointing_steps 500", "use --set run.checkpoint_every=500"),
        ("--resume_from_checkpoint latest", "run the same command again to resume"),
        ("--validation_prompt cat", "use --set run.validation_prompts=cat"),
        ("--proportion_empty_prompts 0.1", "use --set data.caption_drop=0.1"),
        ("--use_8bit_adam", "use --set optim.optimizer=adamw8bit"),
        ("--optimizer_type AdamW8bit", "use --set optim.optimizer=adamw8bit"),
        ("--optimizer_type Prodigy", "use --set optim.optimizer=adamw or adamw8bit"),
        ("--lr_scheduler constant_with_warmup", "use --set optim.lr_scheduler=constant, cosine or linear"),
        ("--random_flip --seed 3", "use --set data.flip=true"),
        ("--w_min 3", "use --set objective.w_min=3"),
        ("--clip_grad_norm 1", "use --set optim.max_grad_norm=1"),
        ("--push_to_hub --hub_model_id me/x", "option --push-to-hub requires a value, got the option --hub_model_id"),
        ("--resolution 512,768", "is not a square; use --buckets 768x512"),
        ("--report_to all", "choose tensorboard or wandb"),
        ("--yes", "training asks no questions"),
        ("--learnin-rate 3", "did you mean --learning-rate?"),
        ("--pre 3", "did you mean --prediction-type, --precision or --preset?"),
        ("--lrn 3", "did you mean --learning-rate?"),
        ("--foo 3", "has no option --foo; see lcmdistill distill --help"),
        ("-x", "has no option -x; see lcmdistill distill --help"),
        ("sd15", "takes no argument 'sd15'; use --teacher sd15"),
        ("owner/name", "use --teacher owner/name"),
        ("tinny", "use --teacher tiny"),
        ("sd15-lora.toml", "use --config sd15-lora.toml"),
        ("a.tar", "use --data a.tar"),
        ("photographs", "the teacher is --teacher MODEL, and your images are --data FOLDER"),
    ],
)
def test_what_cannot_be_accepted_is_answered_with_what_to_do(typed: str, answer: str) -> None:
    with pytest.raises(UsageError, match=re.escape(answer)):
        read(f"distill {typed}")


def test_a_folder_of_images_is_recognized_as_data(image_folder: Path) -> None:
    with pytest.raises(UsageError, match=f"use --data {image_folder}"):
        read(f"distill {image_folder}")


@pytest.mark.parametrize("word", ["--foo", "--bar"])
def test_other_commands_suggest_only_what_is_near(word: str) -> None:
    with pytest.raises(UsageError, match="see lcmdistill sample --help"):
        read(f"sample {word} 3")
    with pytest.raises(UsageError, match=r"did you mean --lora-scale\?"):
        read("sample --lora-scal 3")


@pytest.mark.parametrize("word", synonyms.COMMANDS)
def test_each_word_for_a_command_names_it(word: str, command: Command) -> None:
    code, _, error = command(word)
    assert code == 2
    assert error == f"Error: lcmdistill has no command {word!r}; did you mean {synonyms.COMMANDS[word]}?\n"
    first = synonyms.COMMANDS[word].split()[0]
    assert first in COMMANDS.commands or first.startswith("--")


@pytest.mark.parametrize(
    ("group", "word", "meant"),
    [(group, *each) for group, words in synonyms.SUBCOMMANDS.items() for each in words.items()],
)
def test_each_word_for_a_subcommand_names_it(group: str, word: str, meant: str, command: Command) -> None:
    code, _, error = command(group, word)
    assert (code, error) == (2, f"Error: lcmdistill {group} has no command {word!r}; did you mean {meant}?\n")
    first, second, *_ = meant.split()
    assert second in getattr(COMMANDS.commands[first], "commands", {"RUN": None})


@pytest.mark.parametrize(
    ("words", "answer"),
    [
        (["--teacher", "sd15"], "the command comes first: lcmdistill distill --teacher ...; see lcmdistill --help"),
        (["sd15"], "lcmdistill has no command 'sd15'; did you mean distill --teacher sd15, or sample sd15?"),
        (["cache", "clear", "--quiet"], "lcmdistill cache clear has no option --quiet: "),
        (
            ["runs", "foo"],
            "lcmdistill runs has no command 'foo'; choose from list, remove, clean; see lcmdistill runs --help",
        ),
    ],
)
def test_words_without_a_command_are_answered(words: list[str], answer: str, command: Command) -> None:
    code, _, error = command(*words)
    assert code == 2
    assert error.startswith(f"Error: {answer}")


@pytest.mark.parametrize("option", ["--network-dim", "--rank"])
def test_a_lora_s_option_is_explained_to_distill(option: str) -> None:
    with pytest.raises(UsageError, match=f"{option}, which is for lcmdistill distill-lora"):
        read(f"distill {option} 4")


@pytest.mark.parametrize(
    ("key", "meant"), [("learning_rate", "optim.learning_rate"), ("lr", "optim.learning_rate"), ("k", "objective.skip")]
)
def test_set_without_a_section_names_it(command: Command, key: str, meant: str) -> None:
    code, _, error = command("distill", "--teacher", "tiny", "--set", f"{key}=1")
    assert (code, error) == (2, f"Error: unknown setting {key!r}; did you mean {meant!r}?\n")


@pytest.mark.parametrize("words", [["-V"], ["--version"], ["-h"], ["distill", "-h"], ["sample", "-h"]])
def test_short_options_of_every_command(command: Command, words: list[str]) -> None:
    code, text, _ = command(*words)
    assert code == 0
    assert "lcmdistill" in text


@pytest.mark.parametrize(
    ("command_name", "setting", "other"),
    [
        ("distill", "student.rank=10", "distill-lora"),
        ("distill", "student.target_modules=['to_q']", "distill-lora"),
        ("distill-lora", "student.omega_init=random", "distill"),
    ],
)
def test_a_setting_of_the_other_command_is_refused(
    command: Command, command_name: str, setting: str, other: str
) -> None:
    code, _, error = command(command_name, "--teacher", "tiny", "--dry-run", "--set", setting)
    assert code == 2
    assert f"is a setting of {other} and has no effect on {command_name}" in error


def test_a_former_name_of_a_setting_is_taken_and_the_present_one_reported(command: Command) -> None:
    code, output, _ = command("distill", "--teacher", "tiny", "--dry-run", "--full", "--set", "data.count=77")
    assert code == 0
    assert "--set data.count is now called data.max_samples" in output
    assert "max_samples = 77" in output
    assert "\nresolution = 64 pixels" in output
