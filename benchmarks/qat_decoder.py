"""Quantization-aware training of stories260K at 2 bits, on text that the float model wrote itself.

    python -m benchmarks.qat_decoder            every seed, into benchmarks/results
    python -m benchmarks.qat_decoder --quick    a few steps, into build/benchmarks

No story is trained on: the float model writes the training text by sampling from itself, and its answers on that text
are the targets (Liu et al. 2023, LLM-QAT, arXiv:2305.17888). Calibration and scores are those of every table here: the
first 32 stories, and the 142 others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import narrowcast as nc
from benchmarks import results_io
from benchmarks.kit.stories260k import BOS, KIT
from benchmarks.machine import machine

RULES = [{"role": role, "keep": "float32, as in the other tables", "optional": True} for role in ("embedding", "tied")]
FORMATS = {"W2 g32": "int2/group32/asym", "W3 g32": "int3/group32/asym"}
METHODS = ("ptq", "lsq", "ste")
TOKENS, STORIES, SETTINGS = 256, 1024, {"epochs": 2, "batch": 16, "lr": 0.002, "range_lr": 0.01, "temperature": 1.0}
SEEDS = 3


def recipe(form: str, method: str) -> dict[str, Any]:
    """The recipe of a format, trained in one way."""
    last: dict[str, Any] = {"weight": FORMATS[form]} | ({} if method == "ptq" else {"train": method})
    return {"name": f"{form} {method}", "rule": [*RULES, last]}


def written(count: int, seed: int) -> Tensor:
    """Token ids [count, TOKENS] that the float model samples from itself, BOS first."""
    from benchmarks.peers_low_bits.llama import build  # transformers' class of the same model keeps keys and values

    model: Any = build(KIT, padded=False)
    model.generation_config.eos_token_id = None  # a story that ends is followed by another
    torch.manual_seed(seed)
    rows = []
    for start in range(0, count, 256):
        begin = torch.full((min(256, count - start), 1), BOS)
        rows.append(
            model.generate(
                begin, attention_mask=torch.ones_like(begin), do_sample=True, top_k=0, use_cache=True,
                max_new_tokens=TOKENS - 1, pad_token_id=0,
            )
        )  # fmt: skip
    return torch.cat(rows)


def cell(form: str, method: str, seed: int, text: Tensor, epochs: int) -> dict[str, Any]:
    """Quantize, and train unless `method` is "ptq"; scores of what comes out."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    if method == "ptq":
        result = nc.quantize(KIT.build(), recipe(form, method), KIT.calibration(), progress=False)
    else:
        model = nc.qat.prepare(KIT.build(), recipe(form, method), KIT.calibration(), progress=False)
        settings = nc.qat.FitSettings(
            epochs=epochs, batch_size=SETTINGS["batch"], lr=SETTINGS["lr"], weight_decay=0.0, seed=seed,
            distill=1.0, temperature=SETTINGS["temperature"], range_lr=SETTINGS["range_lr"],
        )  # fmt: skip
        nc.qat.fit(model, list(text.split(SETTINGS["batch"])), settings, teacher=KIT.build())
        result = nc.qat.convert(model, strict=True)
    seconds = time.perf_counter() - started
    return {"perplexity": KIT.evaluate(result.model, "held_out")["perplexity"], "seconds": seconds}


def page(document: dict[str, Any]) -> str:
    """The results as Markdown."""
    float32 = KIT.published["held_out"]["perplexity"]
    rows = []
    for form in FORMATS:
        found = {m: [c for k, c in sorted(document["cells"].items()) if k.startswith(f"{form}:{m}:")] for m in METHODS}
        start = found["ptq"][0]["perplexity"] if found["ptq"] else None
        for method, cells in found.items():
            if not cells:
                continue
            scores = [c["perplexity"] for c in cells]
            mean = statistics.mean(scores)
            recovered = f"{100 * (start - mean) / (start - float32):.0f} %" if start and method != "ptq" else ""
            spread = f"{statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
            seconds = f"{statistics.mean(c['seconds'] for c in cells):.0f}"
            rows.append((form, method, len(scores), f"{mean:.3f}", spread, recovered, seconds))
    header = ("format", "method", "seeds", "perplexity", "spread", "of the loss recovered", "seconds")
    said = (
        f"`python -m benchmarks.qat_decoder`. Perplexity of 142 held-out stories, float32 {float32}. Trained on "
        f"{document['stories']} texts of {TOKENS} tokens that the float model wrote, by distillation: "
        f"{document['settings']}; `ptq` is `nc.quantize` with the same recipe, where training starts. `spread` is the "
        "standard deviation over seeds."
    )
    return results_io.page(
        "Quantization-aware training of a decoder", document["machine"], [said, results_io.table(header, rows)]
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the cells that are asked for and writes the results after each."""
    every = [f"{form}:ptq:0" for form in FORMATS]
    every += [f"{form}:{method}:{seed}" for seed in range(SEEDS) for form in FORMATS for method in METHODS[1:]]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="+", choices=every, metavar="CELL", help="FORMAT:METHOD:SEED, some only")
    parser.add_argument("--quick", action="store_true", help="a few steps: does it work at all?")
    parser.add_argument("--out", type=Path, help="folder of the results")
    options = parser.parse_args(argv)
    if not results_io.available(["stories260k"], print):
        return 2
    folder = options.out or results_io.folder_of(not options.quick)
    epochs, count = (1, 32) if options.quick else (SETTINGS["epochs"], STORIES)
    path = folder / "qat_decoder.json"
    document: dict[str, Any] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() and not options.quick else {"cells": {}}
    )
    text = written(count, seed=0)
    for name in options.cells or every:
        form, method, seed = name.split(":")
        facts = machine()
        value = cell(form, method, int(seed), text, epochs)
        print(name, value, flush=True)
        document["cells"][name] = value | {"commit": facts["commit"], "date": facts["date"]}
        document |= {"machine": facts, "settings": SETTINGS | {"epochs": epochs}, "stories": count}
        results_io.write_results(folder, "qat_decoder", document, page(document))
    return 0


if __name__ == "__main__":
    sys.exit(main())
