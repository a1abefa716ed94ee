"""The verb that has models answer rows, or one prompt."""

import json
from collections.abc import Sequence
from contextlib import closing
from typing import Any

import click

from raytune.cli.group import as_json_option, debug_option, examples
from raytune.cli.models import adapters_by_name, drawing_options, model_argument, model_options
from raytune.cli.say import say
from raytune.cli.supervise import begin_on
from raytune.errors import UserError
from raytune.launch.cluster.address import named_address


@click.command(
    epilog=examples(
        "generate runs/support-bot questions.jsonl --output answers.jsonl",
        "generate runs/support-bot questions.jsonl --base-too --output answers.jsonl --workers 4",
        "generate ./Qwen3-8B prompts.txt --adapter a=runs/a/model --adapter b=runs/b/model --output answers.jsonl",
        "generate runs/support-bot --prompt 'How do I reset it?' --temperature 0.7",
    )
)
@model_argument
@click.argument("rows", nargs=-1)
@click.option("--prompt", metavar="TEXT", help="Ask this alone, in this process, and show the answer as it is written.")
@click.option("--output", metavar="FILE", help="A line of JSON per answer, in the order of the rows. It must not be there yet.")
@click.option("--format", "row_format", help="How rows are read, as data.train.format. Default: recognised by their columns.")
@click.option("--columns", metavar="NAME=COLUMN,...", help="As data.train.columns: prompt=question.")
@click.option("--max-rows", type=click.IntRange(min=1), help="Ask the first rows only, of each of ROWS.")
@click.option("--system", metavar="TEXT", help="System message instead of those of the rows.")
@click.option("--as-text", is_flag=True, help="Continue texts as they are, without a chat template.")
@click.option("--base-too", is_flag=True, help="Ask the base below other models as well.")
@model_options
@drawing_options
@click.option("--beams", "num_beams", type=click.IntRange(min=1), default=1, help="Search for the likeliest answer.")
@click.option("--batch-size", type=click.IntRange(min=1), default=32, show_default=True, help="Answers written at once.")
@click.option("--workers", type=click.IntRange(min=1), help="That answer at once. Default: the run's, or one per GPU or node.")
@click.option("--address", help="Ray cluster instead of the run's, as cluster.address; here: one inside this machine.")
@as_json_option
@debug_option
def generate(
    rows: tuple[str, ...],
    prompt: str | None,
    output: str | None,
    row_format: str | None,
    columns: str | None,
    max_rows: int | None,
    system: str | None,
    as_text: bool,
    base_too: bool,
    adapters: Sequence[str],
    max_new_tokens: int,
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    seed: int,
    num_beams: int,
    batch_size: int,
    workers: int | None,
    address: str | None,
    as_json: bool,
    **named: Any,
) -> None:
    """Have a model answer rows of files, or one prompt.

    MODEL_OR_RUN is what `raytune evaluate` takes. ROWS are files, globs, folders or data sets as in data.train, with or without
    answers: an answer that a row ends with is left out and kept as `expected`. A text is asked as a user's turn where the model
    has a chat template. Finished chunks are kept beside the output, and the same command goes on with the rest.
    """
    if (prompt is None) == (not rows):
        raise UserError("Name files of ROWS, or one --prompt.")
    if (output is None) != (prompt is not None):
        raise UserError("--output is a file for the answers to ROWS: name it with them, and with nothing else.")
    if prompt is not None and num_beams > 1:
        raise UserError("--beams finds an answer whole, which cannot be shown while it is written. Put the prompt into a file.")
    from raytune.evaluation.sampling import sampling_plan
    from raytune.launch.asking.generate import HowToAnswer, prepare_answers
    from raytune.launch.asking.generate import generate as answer_rows
    from raytune.launch.asking.models_to_ask import Named
    from raytune.launch.data.rows_to_score import columns_of, sources_of

    how = HowToAnswer(
        max_new_tokens=max_new_tokens,
        sampling=sampling_plan(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed),
        num_beams=num_beams,
        batch_size=batch_size,
        system=system,
        in_turns=not as_text,
    )
    asked = Named(adapters=adapters_by_name(adapters), **named)
    if prompt is not None:
        _answer_prompt(asked, prompt, how, base_too=base_too, as_json=as_json)
        return
    sources = sources_of(rows, row_format or "auto", max_rows, columns_of(columns))
    prepared = prepare_answers(asked, sources, how, base_too=base_too, address=address, workers=workers)
    begin_on(named_address(prepared.cluster))
    answers = answer_rows(prepared, output)
    say(json.dumps(answers.to_json()) if as_json else "\n".join(answers.lines))


def _answer_prompt(asked: Any, prompt: str, how: Any, *, base_too: bool, as_json: bool) -> None:
    """Show the answers of models to one prompt as they are written, one after the other."""
    from raytune.launch.asking.models_to_ask import models_to_ask
    from raytune.serving.speaker import HeldSpeaker

    found = models_to_ask(asked)
    to_ask = found if base_too else found.without_base()
    answers = []
    with closing(HeldSpeaker(to_ask, in_turns=how.in_turns)) as speaker:
        for name in speaker.models:
            if len(to_ask.subjects) > 1 and not as_json:
                say(f"--- {name}")
            pieces = speaker.answer(name, speaker.question(name, prompt, how.system), how.max_new_tokens, how.sampling, 0)
            try:
                while True:
                    piece = next(pieces)
                    if not as_json:
                        say(piece, nl=False)
            except StopIteration as end:
                written = end.value
            if not as_json:
                say("")
            finish = "stop" if written.has_ended else "length"
            answers.append({"model": name, "answer": written.text, "finish": finish, "tokens": written.num_tokens})
    if as_json:
        say(json.dumps({"prompt": prompt, "answers": answers}))
