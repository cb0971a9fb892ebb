"""What a launcher states in the environment, and what it cannot mean."""

import pytest

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.launch import check_launched, num_processes, process_index


@pytest.mark.parametrize(("text", "index"), [("3", 3), ("abc", 0), ("", 0), ("-1", 0), ("\u0663", 0)])
def test_the_index_of_a_process(monkeypatch: pytest.MonkeyPatch, text: str, index: int) -> None:
    monkeypatch.setenv("RANK", text)
    assert process_index() == index


@pytest.mark.parametrize("text", ["x", "0", "", "1.5"])
def test_an_impossible_number_of_processes_is_one_sentence(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert num_processes() == 8
    monkeypatch.setenv("WORLD_SIZE", text)
    with pytest.raises(UsageError, match="torchrun sets it to a whole number"):
        num_processes()


def test_several_processes_without_a_launcher_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    check_launched()
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(
        UsageError, match=r"no launcher has set RANK .*; start the command with torchrun --nproc-per-node 8"
    ):
        check_launched()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_launched()
