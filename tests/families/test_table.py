"""docs/families.md is what the tests give."""

from __future__ import annotations

import pytest

from scripts import family_table


@pytest.mark.slow
def test_the_table_is_up_to_date(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """Collected once more in this process, where the modules are loaded already."""
    monkeypatch.setattr("sys.argv", ["family_table.py", "--check"])
    for name in ("PYTEST_XDIST_WORKER", "PYTEST_ADDOPTS"):
        monkeypatch.delenv(name, raising=False)
    assert family_table.main() == 0, capfd.readouterr().err
