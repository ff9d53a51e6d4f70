"""The commands. What they do lives in the rooms; imports are inside, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from longcat_lab.errors import LabError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
Overrides = Annotated[list[str] | None, typer.Argument(help="dotted.key=value, as many as wanted")]


@app.callback()
def _about() -> None:
    """Architecture ablations of LongCat-class language models, with error bars."""


@app.command()
def run(
    ablation: Annotated[Path, typer.Argument(help="the question: a YAML file")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="folder of the sweep; runs/NAME if not given")] = None,
    jobs: Annotated[int | None, typer.Option(help="jobs side by side; if not given, at most 4 and one a core here, all in a queue")] = None,
    executor: Annotated[str, typer.Option(help="where jobs run: local, slurm, or one of your own")] = "local",
    plan: Annotated[
        bool, typer.Option("--plan", help="run nothing: jobs, cost, what is held equal, the smallest effect to be seen")
    ] = False,
    measure: Annotated[bool, typer.Option(help="with --plan: run a few steps of each variant to know the cost")] = True,
) -> None:
    """Run every variant and seed of an ablation; running it again does only what is missing."""
    from longcat_lab.ablation import forecast
    from longcat_lab.ablation import run as run_ablation

    if plan:

        def say(line: str) -> None:
            typer.echo(line, err=True)

        found = forecast(ablation, out=out, jobs=jobs, overrides=overrides or (), measure=measure, executor=executor, say=say)
        for line in found.lines:
            typer.echo(line)
        return
    folder = run_ablation(ablation, out=out, jobs=jobs, overrides=overrides or (), executor=executor)
    typer.echo(f"Every job is done. The result page: longcat-lab report {folder}")


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="a sweep's folder, such as runs/demo")],
    check: Annotated[bool, typer.Option("--check", help="render nothing: compare the page, the notebooks and the results")] = False,
) -> None:
    """Render the result page and the jobs' notebooks from what is in a sweep's folder, check them, and print the page's path.

    Exit code 1 where numbers disagree, a notebook was not executed from top to bottom, or a planned job is unaccounted for.
    """
    from longcat_lab.ablation import check as compare
    from longcat_lab.ablation import render

    page = folder / "report.html" if check else render(folder)
    problems = compare(folder)
    for problem in problems:
        typer.echo(f"longcat-lab: {problem}", err=True)
    if problems:
        typer.echo(f"longcat-lab: {page} fails its check: {len(problems)} disagreements.", err=True)
        raise typer.Exit(1)
    typer.echo("Checked: the page, the notebooks and results.parquet agree, and every planned job is accounted for.")
    typer.echo(page)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="a preset or a YAML file")],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder; runs/single/IDENTITY if not given")] = None,
    nproc: Annotated[int | None, typer.Option(help="processes that are started for it on this machine, as torchrun does")] = None,
) -> None:
    """Train one run; the same command goes on from its checkpoint after a stop."""
    from longcat_lab.config import load
    from longcat_lab.config.parallel import ParallelConfig
    from longcat_lab.data import prepare
    from longcat_lab.parallel import world
    from longcat_lab.training import device, fit

    try:
        resolved = load(config, *(overrides or ()))
    except LabError:  # perhaps of this process alone: it meets the others to tell them
        with contextlib.suppress(LabError):
            world.start(ParallelConfig(), device.backend(device.choose("auto")))
        raise
    world.start(resolved.parallel, device.backend(device.choose(resolved.training.device)))
    with world.others_wait():
        if world.is_first():
            prepare(resolved.data, resolved.model.vocab_size, progress=lambda line: typer.echo(f"data: {line}", err=True))
    finished = fit(resolved, out, progress=sys.stderr.isatty(), nproc=nproc)
    if world.is_first():
        typer.echo((finished.path / "optimizer.txt").read_text(encoding="utf-8"))
        for key, value in finished.summary.items():
            typer.echo(f"{key:28} {value:.4f}" if isinstance(value, float) else f"{key:28} {value}")
        typer.echo(finished.path)
    world.leave()


@app.command()
def budget(
    config: Annotated[str, typer.Argument(help="a preset or a YAML file")],
    overrides: Overrides = None,
    context_length: Annotated[int | None, typer.Option(help="tokens of the sequence that FLOPs are given for", min=1)] = None,
) -> None:
    """Parameters, active parameters, forward FLOPs a token and cache bytes a token, by part; activated parameters by k."""
    from longcat_lab.budget import activated
    from longcat_lab.budget import budget as table
    from longcat_lab.config import load

    resolved = load(config, *(overrides or ()))
    typer.echo(table(resolved, context_length).to_string(float_format="{:,.0f}".format))
    if resolved.model.moe.zero_expert_num:
        ends = activated(resolved)["activated params"]
        k, expected = resolved.model.moe.moe_topk, resolved.model.moe.real_experts
        typer.echo(
            f"activated, by real experts a token: {ends.iloc[0]:,} (0) to {ends.iloc[-1]:,} ({k}); {ends[expected]:,} at {expected:g}, "
            "without input embedding, n-gram projections and prediction steps"
        )


@app.command()
def ngrams(
    config: Annotated[str, typer.Argument(help="a preset or a YAML file; its model.embedding.ngram (or model.ffn) is the plan")],
    overrides: Overrides = None,
    tokens: Annotated[int, typer.Option(help="of the training text that are counted", min=1)] = 200_000,
) -> None:
    """What the n-gram tables of a configuration make of its text: load, collisions, joint addresses, and what to change."""
    from longcat_lab.blocks.ngram_embedding.analyse import recommend
    from longcat_lab.blocks.ngram_embedding.hash_config import HashSettings
    from longcat_lab.config import load
    from longcat_lab.data import prepare
    from longcat_lab.notebook.ngram_report import corpus_stream

    resolved = load(config, *(overrides or ()))
    plans = [getattr(resolved.model.embedding, "ngram", None), resolved.model.ffn]
    plan = next((each for each in plans if isinstance(each, HashSettings)), None)
    if plan is None:
        raise LabError(f"{config} has no hashed n-gram tables: set model.embedding.ngram.order, as in model.embedding.ngram.order=3.")
    stream, documents = corpus_stream(prepare(resolved.data, resolved.model.vocab_size), tokens=tokens)
    found = recommend(plan, stream, documents, resolved.model.vocab_size)
    columns = ["order", "split", "rows", "ngrams", "rows_used", "hit_rate", "load", "colliding", "expected", "relative", "sharing"]
    typer.echo(found.before.table.reset_index()[columns].to_string(index=False, float_format="{:.3f}".format))
    typer.echo(found.before.orders[["tables", "ngrams", "addresses", "colliding", "needed", "covers"]].to_string())
    for sentence in (*found.before.advice(), "Recommended:", *found.sentences):
        typer.echo(sentence)


@app.command()
def plan(
    config: Annotated[str, typer.Argument(help="a preset or a YAML file")],
    overrides: Overrides = None,
    cards: Annotated[int, typer.Option(help="cards; each has one rank, or one for each of its dies", min=1)] = 8,
    card: Annotated[str, typer.Option(help="what they are: a name such as ascend-910c, or a YAML file")] = "ascend-910c",
    network: Annotated[str | None, typer.Option(help="what they stand in; the card's own if not given")] = None,
    sequence: Annotated[int | None, typer.Option(help="tokens of a sequence; 8192, or what the model takes", min=2)] = None,
    batch: Annotated[int | None, typer.Option(help="sequences of a step; about 67 M tokens' worth, fewer for few cards", min=1)] = None,
    optimizer: Annotated[str | None, typer.Option(help="adamw or muon; the configuration's own if not given")] = None,
    top: Annotated[int, typer.Option(help="layouts that are shown", min=1)] = 3,
    setting: Annotated[list[str] | None, typer.Option(help="not searched: pipeline=16, recompute=full, ...; may be repeated")] = None,
    assumptions: Annotated[Path | None, typer.Option(help="a YAML file in place of the planner's own figures")] = None,
    json: Annotated[Path | None, typer.Option(help="file that the plan is written to as well")] = None,
) -> None:
    """How a model would lie on many cards: layout, memory by stage, bytes on the wire, step time; without the cards."""
    from longcat_lab.config import load
    from longcat_lab.files import write_json
    from longcat_lab.parallel.planner import plain, settings, told
    from longcat_lab.parallel.planner import plan as search

    fixed = settings(setting or ())
    found = search(load(config, *(overrides or ())), cards, card, network, sequence, batch, optimizer, top, assumptions, config, **fixed)
    typer.echo(told(found))
    if json is not None:
        write_json(json, plain(found))
    if not found.best:
        raise typer.Exit(1)


@app.command()
def doctor() -> None:
    """What this machine has, and what each missing piece would need."""
    from longcat_lab.cli.doctor import NEVER_EXERCISED, examine

    rows = examine()
    width = max(len(row.name) for row in rows)
    for row in rows:
        typer.echo(f"{'ok     ' if row.present else 'missing'} {row.name:{width}}  {row.found if row.present else row.needs}")
    typer.echo("never exercised here, in no test of this project:")
    for what in NEVER_EXERCISED:
        typer.echo(f"  {what}")
    if not all(row.present for row in rows if row.required):
        raise typer.Exit(1)


def main() -> None:
    """Entry point: mistakes end with one sentence on stderr and exit code 2, a stop with 130; of several processes the first says it."""
    try:
        app()
    except LabError as error:
        # A sweep that was stopped exits as any stopped program does; it has said how to go on.
        _end(130 if type(error).__name__ == "LabInterrupted" else 2, f"longcat-lab: {error}", error)
    except KeyboardInterrupt as error:
        _end(130, "longcat-lab: stopped; the same command goes on from here.", error)
    except BrokenPipeError:  # the reader of our output has gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _end(code: int, sentence: str, error: BaseException) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        typer.echo(sentence, err=True)
        sys.exit(code)
    from longcat_lab.parallel import faults

    told = faults.explained(error) if isinstance(error, Exception) else error
    if faults.speaks(told):
        typer.echo(sentence if told is error else f"longcat-lab: {told}", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an ordinary exit may wait for connections to processes that have gone
