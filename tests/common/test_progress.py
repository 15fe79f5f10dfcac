"""Where progress bars are shown."""

import pytest
from tqdm import auto

from fishleg_ext.common import progress


@pytest.mark.parametrize("notebook, show, disabled", [(False, True, None), (True, True, False), (True, False, True)])
def test_bars_of_notebooks_need_no_terminal(notebook, show, disabled, monkeypatch):
    seen = {}
    monkeypatch.setattr(progress, "tqdm", lambda items, **options: seen.update(options))
    monkeypatch.setattr(auto, "notebook_tqdm", object if notebook else auto.std_tqdm)
    progress.progress_bar([1], what="bar", show=show)
    assert seen["disable"] is disabled
