"""The ablations' page is made of its runs' numbers: what is drawn, and that the verdicts follow the numbers."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

sweep: Any = import_module("lcmdistill.cli.sweep")
"the module, of which the package has a function of the same name"

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "ablations"


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    for name in ("run", "report"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import report  # pyright: ignore[reportMissingImports]
    import run  # pyright: ignore[reportMissingImports]

    yield run, report
    for name in ("run", "report"):
        sys.modules.pop(name, None)


def numbers(run: Any, **changed: float) -> dict[str, Any]:
    """Made-up numbers that bear out every claim but the last; changed: {"run_steps": rmse and kid}, with _ for -."""
    found: dict[str, Any] = {}
    for name in run.FOLDERS:
        steps = run.MANY if name in run.COMPARED else run.STEPS
        scales = [omega + 1.0 for omega in run.OMEGAS] if name == "lcm" else [5.0]
        cells = {}
        for scale in scales:
            cells[f"teacher-50-g{scale:g}"] = {"rmse": 0.0, "kid": 0.02}
            for n in steps:
                value = {1: 1.0, 2: 0.5, 4: 0.45, 8: 0.4, 16: 0.39}[n] + 0.01 * scale
                value += (0.2 * (n == 16) + 0.1 * (n == 8)) * (name == "lcm-long") - 0.01 * name.startswith("tcd")
                value += 0.3 * name.startswith("k1-") + 0.2 * (name == "k50-ddim") + 0.1 * (name == "ema-0")
                key = f"{name.replace('-', '_')}_{n}"
                value = {key: value, **changed}[key]
                cells[f"student-{n:02d}-g{scale:g}"] = {"rmse": value, "kid": value / 2, "kid_teacher": value / 3}
        found[name] = cells
    return found


def test_the_sweeps_make_every_run_of_the_page(modules: Any) -> None:
    run, _ = modules
    made = set()
    for words in run.commands():
        if words[:2] == ["sweep", "distill"]:
            options = {"--output", "--num-images", "--eval-steps", "--eval-guidance-scale"}
            pairs = list(zip(words[2::2], words[3::2], strict=True))
            own = {name: value for name, value in pairs if name in options}
            assert set(own) == options
            training = [word for name, value in pairs if name not in options for word in (name, value)]
            fixed, axes = sweep.split_grid(training, sweep._parameters("distill"))
            folder = Path(own["--output"])
            for name, words_of_run in sweep.grid_cells(axes):
                sweep._configuration("distill", folder / name, [*fixed, *words_of_run])
                made.add(folder / name)
        else:
            assert words[0] == "evaluate"
    copied = run.RUNS / run.FOLDERS["tcd-long-eta-0"]
    assert {run.RUNS / folder for folder in run.FOLDERS.values()} == made | {copied}


def test_the_page_has_its_figures_and_every_number(modules: Any, tmp_path: Path) -> None:
    run, report = modules
    report.write_report(numbers(run), tmp_path)
    page = (tmp_path / "README.md").read_text()
    for name in report.HEADS:
        assert (tmp_path / f"{name}.png").stat().st_size > 5000
        assert f"({name}.png)" in page
    assert page.count("| shows |") == 14
    assert page.count("**does not show**") == 1
    assert "| lcm | 8 |" in page


@pytest.mark.parametrize(
    ("figure", "place", "changed"),
    [
        ("skip_solver", 0, {"k1_ddim_2": 0.1}),
        ("skip_solver", 1, {"k50_dpm_solver_2": 0.9}),
        ("omega", 0, {"lcm_4": 0.3}),
        ("omega", 1, {"lcm_1": 0.5}),
        *[("lcm_tcd", place, {"lcm_long_16": 0.1}) for place in (0, 3, 6)],
        *[("lcm_tcd", place, {"tcd_long_8": 0.9}) for place in (1, 4, 7)],
        *[("lcm_tcd", place, {"tcd_long_eta_0_16": 0.9}) for place in (2, 5, 8)],
        ("ema", 0, {"ema_0_2": 0.1}),
    ],
)
def test_a_verdict_follows_the_numbers(modules: Any, figure: str, place: int, changed: dict[str, float]) -> None:
    run, report = modules
    usual, other = (report.claims(numbers(run, **each))[figure][place].shows for each in ({}, changed))
    assert usual
    assert not other


def test_missing_numbers_cannot_be_plotted(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, _ = modules
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["run.py", "--draw"])
    with pytest.raises(SystemExit):
        run.main()
    assert (
        "runs/ablations lacks the numbers of 22 runs, lcm first; remove --draw to make them" in capsys.readouterr().err
    )
