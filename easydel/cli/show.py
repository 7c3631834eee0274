"""`easydel show`: print one row as the trainer sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import islice
from typing import Any

from easydel.cli.dpo import DATA_OPTIONS, run_sections
from easydel.cli.failures import UsageError, refusing
from easydel.cli.flags import Section, parse_flags
from easydel.cli.inputs import open_rows, open_tokenizer
from easydel.cli.request import layers, require_options
from easydel.option_types import Text
from easydel.options import Option, own_options

USAGE = "easydel show FILE --model MODEL [--row N] [options]"
DESCRIPTION = "Print one row of a data file as the trainer sees it: tokens, cuts, and what carries loss."
FILE = Option("file", Text(), dataclasses.MISSING, "Data file, as for --train-dataset of easydel dpo.", "FILE")
ROW_IS_GOOD, ROW_IS_BAD = 0, 2
# The options of a run that matter here; the configuration file of a run can be used unchanged.
OF_THE_RUN = ("model", "chat_template", "loss_type", "config")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShowOptions:
    """Options that only `easydel show` has."""

    row: int = 0
    """Row to show, counted from 0."""


def run_show(arguments: Sequence[str]) -> int:
    """Print the row, or why it would be dropped; only the tokenizer is loaded. Returns the exit code.

    Raises:
      UsageError: options, file, tokenizer or row number are not right.
    """
    run_options = {option.name: option for section in run_sections() for option in section.options}
    of_the_run = tuple(run_options[name] for name in OF_THE_RUN)
    of_the_data = tuple(run_options[name] for name in DATA_OPTIONS)
    sections = (
        Section("model and row", (*of_the_run, *own_options(ShowOptions))),
        Section("how rows become pairs", of_the_data),
    )
    given = parse_flags("show", USAGE, DESCRIPTION, sections, arguments, positional=FILE)
    in_file, in_flags = layers(given, run_options.values())
    values = in_file | in_flags
    require_options(values, of_the_run)
    return _show(
        file=values["file"],
        row=values.get("row", ShowOptions().row),
        tokenizer=open_tokenizer(values["model"], values.get("chat_template")),
        options={option.name: values.get(option.name, option.default) for option in of_the_data}
        | {"reads_margin": _needs_margin(values.get("loss_type", run_options["loss_type"].default))},
    )


def _needs_margin(loss_type: str | Sequence[str]) -> bool:
    from easydel.trainers.direct_preference_optimization_trainer.objectives.objective import named_objectives

    with refusing(ValueError):
        return any(objective.needs_margin for objective in named_objectives(loss_type))


def _show(file: str, row: int, tokenizer: Any, options: dict[str, Any]) -> int:
    from rich.console import Console
    from rich.text import Text

    from easydel.data.faults import RowFault, in_quotes
    from easydel.data.preference.columns import unread_columns
    from easydel.data.preference.show import render_fault, render_pair
    from easydel.data.preference.transform import PreferenceTransform

    source = open_rows(file)
    if row < 0:
        raise UsageError(f"--row {row}: expected a whole number of at least 0.")
    with refusing(OSError, ValueError):
        transform = PreferenceTransform(tokenizer, **options)
        if source.has_random_access:
            found = source[row] if row < len(source) else None
        else:
            found = next(islice(source, row, None), None)
    if found is None:
        raise UsageError(f"--row {row}: {file} ends before it; rows are counted from 0.")
    pair = transform(found, row)
    unread = unread_columns([found], reads_margin=transform.reads_margin)
    if unread:
        Console().print(Text(f"columns that are not read: {in_quotes(unread)}"))
    if isinstance(pair, RowFault):
        Console().print(render_fault(pair, source.locate(row)))
        return ROW_IS_BAD
    Console().print(render_pair(pair, tokenizer))
    return ROW_IS_GOOD
