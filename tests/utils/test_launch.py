"""What a launcher states in the environment, and what it cannot mean."""

import pytest

from lcmdistill.utils.errors import UsageError
from lcmdistill.utils.launch import num_processes, process_index


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
