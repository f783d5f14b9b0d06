"""A noisy response is made once; asked again, a client gives the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fedgrove.errors import FedgroveError
from fedgrove.privacy.release import release_once


def test_a_noisy_answer_is_made_once_and_given_again(tmp_path: Path) -> None:
    drawn = iter(range(9))

    def make() -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        return {"x": torch.tensor([next(drawn)])}, {"stage": 0}

    first = release_once(tmp_path, "run/0/1", "ash", make)
    assert release_once(tmp_path, "run/0/1", "ash", make) == first == ({"x": torch.tensor([0])}, {"stage": 0})
    assert release_once(tmp_path, "run/0/2", "ash", make)[0]["x"] == 1
    with pytest.raises(FedgroveError, match="'ash': it has released this once"):
        release_once(tmp_path, "run/0/1", "ash", make)
