"""The console script."""

import sys
from types import ModuleType

import pytest

from lcmdistill.__main__ import main


class BeingImported(ModuleType):
    """A module whose import Ctrl-C ends."""

    def __getattr__(self, name: str) -> None:
        raise KeyboardInterrupt


def test_ctrl_c_during_the_imports_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lcmdistill.cli", BeingImported("lcmdistill.cli"))
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted; nothing was started\n"
