"""`narrowcast qat`: a model in, trained with its quantization in sight, the quantized model out in a directory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from narrowcast.cli import qat_options as o
from narrowcast.cli.console import JsonOption, Output, QuietOption
from narrowcast.cli.datasets import (
    BatchOption,
    DeviationOption,
    LimitOption,
    MeanOption,
    SideOption,
    TokenizerOption,
    data_options,
)
from narrowcast.cli.plan import RecipeOption
from narrowcast.cli.sources import ModelArgument
from narrowcast.errors import DataError

if TYPE_CHECKING:
    from narrowcast.cli.qat_run import Asked, Opened, Trained


def qat(
    model: ModelArgument, recipe: RecipeOption, data: o.TrainOption, out: o.OutOption,
    calibration: o.CalibrationOption = None, eval_data: o.EvalOption = None, metric: o.MetricOption = None,
    goal: o.GoalOption = None, loss: o.LossOption = None, epochs: o.EpochsOption = None, steps: o.StepsOption = None,
    batch_size: BatchOption = 32, lr: o.RateOption = 1e-4, range_lr: o.RangeRateOption = None,
    optimizer: o.OptimizerOption = "adamw", weight_decay: o.DecayOption = 1e-4, seed: o.SeedOption = 0,
    distill: o.DistillOption = 0.5, temperature: o.TemperatureOption = 2.0, freeze_after: o.FreezeOption = 0.0,
    freeze_ranges_after: o.FreezeRangesOption = 1.0, patience: o.PatienceOption = None,
    eval_every: o.EvalEveryOption = None, checkpoint_every: o.CheckpointOption = None, state: o.StateOption = None,
    resume: o.ResumeOption = False, limit: LimitOption = None, eval_limit: o.EvalLimitOption = None,
    tokenizer: TokenizerOption = None, mean: MeanOption = "", std: DeviationOption = "",
    image_size: SideOption = None, as_json: JsonOption = False, quiet: QuietOption = False,
) -> None:  # fmt: skip
    """Train a model with its quantization in sight, starting from post-training quantization, and save it quantized.

    The loss is that of the data: class labels, or the next token of texts and token ids, mixed with the float model's
    answers. With --eval-data the best evaluated state is saved, which may be that before training. The state of
    training is written as it goes: after a crash the same command with --resume ends with the same weights.

    Examples:
        narrowcast qat my_nets:build -r w4a4.toml -d train.npz --eval-data test.npz --epochs 5 -o my-w4a4
        narrowcast qat my_nets:build -r w2a4.toml -d photos/ --lr 1e-3 --freeze-after 0.7 --resume -o my-w2a4
        narrowcast qat ./my-llama -r weight-int4 -d texts.txt --steps 500 --lr 1e-5 -o my-int4
    """
    output = Output(as_json=as_json, quiet=quiet)
    given = data_options(batch_size, limit, tokenizer, mean, std, image_size)
    with output.working(f"opening {model} and its data"):
        from narrowcast.cli.qat_run import Asked, open_all, prepared
        from narrowcast.qat import FitSettings

        _check_options(eval_data, metric, goal, patience, eval_every, out)
        settings = FitSettings(
            epochs, steps, batch_size, lr, optimizer, weight_decay, seed, distill, temperature, freeze_after,
            freeze_ranges_after, patience, eval_every, checkpoint_every, range_lr,
        )  # fmt: skip
        asked = Asked(
            model, recipe, data, calibration, eval_data, metric, goal, loss, settings, given, eval_limit,
            state or Path(f"{out}.training"), resume,
        )  # fmt: skip
        opened = open_all(asked)
    _say_beginning(output, opened, asked)
    trained = _trained(output, opened, asked, prepared(opened, asked, output))
    _save(output, opened, asked, trained, out)


def _check_options(
    evaluation: str | None, metric: str | None, goal: str | None, patience: int | None, every: int | None, out: Path
) -> None:
    """Refuse what would have no effect, and a place where nothing can be written."""
    from narrowcast.cli.quantize import check_destinations

    check_destinations(out, None)
    named = {"--metric": metric, "--goal": goal, "--patience": patience, "--eval-every": every}
    unused = [name for name, value in named.items() if value is not None]
    if evaluation is None and unused:
        raise DataError(f"{unused[0]} needs data to evaluate on; add --eval-data")


def _say_beginning(output: Output, opened: Opened, asked: Asked) -> None:
    for note in [*opened.order.notes, *opened.notes]:
        output.note(note)
    if asked.evaluation is None:
        output.note("no --eval-data: the last state is saved, and nothing tells whether training helped")
    if asked.resume:
        begin = f"there is no state in {asked.state} yet: training starts from the beginning"
        goes_on = opened.found and f"going on from step {opened.found['step']} of the state in {asked.state}"
        output.note(goes_on or begin)


def _trained(output: Output, opened: Opened, asked: Asked, model: Any) -> Trained:
    """Training with its progress; an interruption says how to go on."""
    from narrowcast.cli.qat_progress import TrainingProgress
    from narrowcast.cli.qat_run import train

    begin = opened.found["step"] if opened.found else None
    with TrainingProgress(output, opened.metric, begin) as progress:
        try:
            return train(opened, asked, model, progress)
        except KeyboardInterrupt:
            if progress.last_saved is not None:
                where = f"the state of step {progress.last_saved} is in {asked.state}"
                output.note(f"{where}: the same command with --resume goes on from there")
            raise


def _save(output: Output, opened: Opened, asked: Asked, trained: Trained, out: Path) -> None:
    """Save the model with what training did in its report, and show it."""
    import narrowcast as nc

    lines = _story(opened, trained)
    trained.quantized.report.notes.extend(lines)
    with output.working(f"saving {out}"):
        nc.save(trained.quantized, out)
    output.json(_document(opened, trained, out))
    for warning in trained.warnings:
        output.warn(warning)
    if output.quiet:
        return
    from narrowcast.report import format_bytes

    for note in trained.fitted.notes[len(opened.order.notes) :]:
        output.note(note)
    for line in lines:
        output.show(line)
    size = sum(file.stat().st_size for file in out.iterdir())
    output.show(f"saved to {out} ({format_bytes(size)})")
    kept = sum(file.stat().st_size for file in asked.state.iterdir())
    output.note(
        f"the state of training is in {asked.state} ({format_bytes(kept)}): --resume with more --epochs or --steps "
        "goes on from it; delete it when you are done"
    )


def _story(opened: Opened, trained: Trained) -> list[str]:
    """What training did, in lines."""
    fitted, metric, score = trained.fitted, opened.metric, trained.score
    early = f", stopped early of {fitted.planned}" if fitted.stopped_early else ""
    first = f"trained     {fitted.steps} steps{early}"
    if metric is None or score is None or fitted.best is None:
        return [first]
    step = fitted.best[1]
    if step == fitted.steps:
        kept = "the last state is the best one"
    elif step == 0:
        kept = "no evaluated state was better than the start: the model is what post-training quantization made of it"
    else:
        kept = f"the best evaluated state, of step {step}, was restored"
    return [
        f"{first}; {kept}",
        f"{metric.name} of {score.samples} {score.per}s" if score.per else metric.name,
        f"  float      {metric.text(score.reference)}",
        f"  before     {metric.text(fitted.scores[0][1])}  post-training quantization",
        f"  after      {metric.text(score.candidate)}  {metric.change(score)} from float, 95 % interval in brackets",
    ]


def _document(opened: Opened, trained: Trained, out: Path) -> dict[str, Any]:
    """The result for machines."""
    fitted, metric, score = trained.fitted, opened.metric, trained.score
    judged = None
    if metric is not None and score is not None:
        judged = {
            "name": metric.name, "higher_is_better": metric.higher, "samples": score.samples,
            "float": score.reference, "before": fitted.scores[0][1], "after": score.candidate,
            "difference": asdict(score.difference),
        }  # fmt: skip
    best = None if fitted.best is None else {"score": fitted.best[0], "step": fitted.best[1]}
    return {
        "out": str(out), "metric": judged, "best": best, "steps": fitted.steps, "planned": fitted.planned,
        "stopped_early": fitted.stopped_early, "resumed_from": fitted.resumed, "losses": fitted.losses,
        "scores": fitted.scores, "warnings": trained.warnings, "notes": [*opened.notes, *fitted.notes],
        "health": fitted.health.to_dict()["layers"], "report": trained.quantized.report.to_dict(),
    }  # fmt: skip
