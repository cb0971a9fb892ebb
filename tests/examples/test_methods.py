"""The comparison of methods: its commands make every run of its page, and the verdicts follow the numbers."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sweep: Any = import_module("lcmdistill.cli.sweep")
"the module, of which the package has a function of the same name"

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "ablations"
NAMES = ("methods", "methods_page")


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield tuple(import_module(name) for name in NAMES)
    for name in NAMES:
        sys.modules.pop(name, None)


def numbers(methods: Any, seeds: tuple[int, ...] = (0, 1, 2), **changed: float) -> dict[str, Any]:
    """Made-up numbers that bear out every claim; changed: {metric of METHOD_STEPS: value}, with _ for other characters."""
    found: dict[str, Any] = {}
    for seed in seeds:
        for run in methods.FOLDERS:
            better = 0.05 * (run not in ("LCM", "TCD")) + 0.02 * run.endswith("trajectory")
            points = {}
            for n in methods.STEPS:
                value = 1 / n - better + 0.001 * seed
                cell = {
                    "rmse": value,
                    "kid_teacher": value / 4,
                    "sharpness": 1.05,
                    "saturation": 0.9,
                    "diversity": 0.95,
                }
                name = "".join(letter if letter.isalnum() else "_" for letter in run)
                points[f"student-{n:02d}-g4"] = {
                    metric: changed.get(f"{metric}_of_{name}_{n}", own) for metric, own in cell.items()
                }
                points[f"trailing-{n:02d}-g4"] = {"rmse": 2.0, "kid_teacher": 0.5}
            found.setdefault(str(seed), {})[run] = points
    return found


def test_the_commands_make_every_run_of_the_page(modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    methods, _ = modules
    monkeypatch.chdir(tmp_path)
    methods.write_prompts()
    assert len(set(methods.PROMPTS.read_text().splitlines())) == methods.NUM_PROMPTS
    made = set()
    for words in methods.commands(1):
        options = {"--output", "--num-images", "--eval-steps", "--eval-guidance-scale"}
        first = 2 if words[0] == "sweep" else 1
        if words[0] == "evaluate":
            continue
        pairs = list(zip(words[first::2], words[first + 1 :: 2], strict=True))
        folder = Path(dict(pairs)["--output"])
        training = [word for name, value in pairs if name not in options for word in (name, value)]
        fixed, axes = sweep.split_grid(training, sweep._parameters("distill"))
        cells = list(sweep.grid_cells(axes)) if axes else [("", [])]
        for name, words_of_run in cells:
            config = sweep._configuration("distill", folder / name, [*fixed, *words_of_run])
            made.add(folder / name)
            length = methods.TRAIN_STEPS
            if config.objective_name == "tdm":
                length = methods.tdm_steps(config.objective.segments)
            assert (config.optim.max_train_steps, config.optim.learning_rate, config.run.seed) == (length, 1e-4, 1)
    assert made == {methods.RUNS / "seed-1" / folder for folder in methods.FOLDERS.values()}


def test_the_page_has_its_figure_and_every_number(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, page = modules
    monkeypatch.setattr(page, "PANELS", {head: lines for head, lines in page.PANELS.items() if head != "methods"})
    monkeypatch.setattr(page, "TITLES", {metric: page.TITLES[metric] for metric in ("kid_teacher", "rmse")})
    page.write_page(numbers(methods), tmp_path)
    text = (tmp_path / "methods.md").read_text()
    assert (tmp_path / "methods.png").stat().st_size > 5000
    assert "Complete seeds: 0, 1, 2 of 0, 1, 2.\n" in text
    assert "does not show" not in text
    for run in methods.FOLDERS:
        assert text.count(f"\n| {run} | ") == len(page.TITLES)
    assert "| LCM | 1.00 (1.00 to 1.00) | .501 (.500 to .502) |" in text


def test_a_page_of_few_runs_names_what_is_missing(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    methods, page = modules
    monkeypatch.setattr(page, "draw", lambda *of: None)
    found = numbers(methods, (0, 1))
    del found["1"]["TDM, 4 segments"]
    page.write_page(found, tmp_path)
    text = (tmp_path / "methods.md").read_text()
    assert "Complete seeds: 0 of 0, 1, 2; partial: 1 (13 of 14 runs). The command trains the missing runs." in text
    assert page.claims({"0": {"TCD": found["0"]["TCD"]}}) == []


@pytest.mark.parametrize(
    ("start", "changed"),
    [
        ("PCM of 2 phases at 2 steps", {"kid_teacher_of_PCM__2_phases_2": 0.13}),
        ("PCM trained for 4 steps: RMSE", {"rmse_of_PCM__4_phases_4": 0.3}),
        ("TDM trained for 1 step: KID", {"kid_teacher_of_TDM__1_segment_1": 0.3}),
        ("TDM trained for 2 steps: sharpness", {"sharpness_of_TDM__2_segments_2": 0.85}),
        ("TDM trained for 4 steps: diversity", {"diversity_of_TDM__4_segments_4": 0.85}),
        ("TCD with `data.trajectory=8`: RMSE below that without at 2 steps", {"rmse_of_TCD__trajectory_2": 0.6}),
    ],
)
def test_a_verdict_follows_the_numbers(modules: Any, start: str, changed: dict[str, float]) -> None:
    methods, page = modules
    for each, shows in (({}, True), (changed, False)):
        assert [c.shows for c in page.claims(numbers(methods, methods.SEEDS, **each)) if c.text.startswith(start)] == [
            shows
        ]


def test_a_difference_within_the_standard_error_is_called_so(modules: Any) -> None:
    methods, page = modules
    found = numbers(methods)
    for runs in found.values():
        for points in runs.values():
            points["student-02-g4"]["kid_teacher_error"] = 0.01
    a, b = ("PCM, 2 phases", "kid_teacher", 2), ("LCM", "kid_teacher", 2)  # .0125 apart, and the error is .0141
    assert page.within_error(found, a, b)
    first, *others = page.claims(found)
    assert "; the difference from LCM at 2 steps is within its standard error" in first.evidence
    assert first.verdict == "shows"  # the difference from LCM at 1 step is not
    assert [c.verdict for c in others if c.text.startswith("TDM trained for 2 steps: KID")] == [
        "no measurable difference"
    ]
    found["0"]["LCM"]["student-02-g4"]["kid_teacher"] += 0.02
    assert not page.within_error(found, a, b)
    assert not page.within_error(numbers(methods), a, b)


def test_without_runs_there_is_no_page(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    methods, _ = modules
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["methods.py", "--draw"])
    with pytest.raises(SystemExit):
        methods.main()
    assert "runs/methods has no evaluated runs; remove --draw to make them" in capsys.readouterr().err
