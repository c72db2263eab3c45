"""Merging: check everything, merge, write, and say what was lost."""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax

from jaxmerge import io
from jaxmerge.base import Adapter
from jaxmerge.cli.actions import reporting
from jaxmerge.cli.actions.asked import conflicts, is_recipe, recipe_of
from jaxmerge.cli.actions.machine import join, keep_programs, placing
from jaxmerge.cli.actions.preview import print_preview
from jaxmerge.cli.actions.summary import print_summary, summarise
from jaxmerge.cli.console import progress, report, report_error, report_problems, working
from jaxmerge.io.atomic import existing_ancestor
from jaxmerge.io.recipe_file import RECIPE, is_ours
from jaxmerge.layouts import Conversion
from jaxmerge.previewing import preview_of
from jaxmerge.recipes.arguments import conversion, files, truncation
from jaxmerge.recipes.checks import notes_of
from jaxmerge.recipes.headers import inspect
from jaxmerge.recipes.model import Recipe
from jaxmerge.recipes.places import told
from jaxmerge.recipes.running import Workplace
from jaxmerge.recipes.running import run as run_recipe
from jaxmerge.sharding import first_process, seen_everywhere


def run(options: argparse.Namespace) -> int:
    """Merges; returns 1, with nothing written, if something is wrong with the inputs."""
    if wrong := conflicts(options):
        for line in wrong:
            sys.stderr.write(f"jaxmerge: {line}\n")
        return 2
    keep_programs(options)
    try:
        join(options)
        recipe, places = recipe_of(options), placing(options)
        found = inspect(recipe, **places)
        problems = [*told(found.problems).splitlines(), *target_problems(options, recipe, found.adapters)]
        problems += reporting.problems_of(options)
        if problems or found.plan is None:
            return report_problems(list(dict.fromkeys(problems)), options.json)
        if options.dry_run:
            preview = preview_of(found.plan, cut_later=truncation(recipe) is not None, notes=notes_of(recipe))
            return report({"ok": True, **preview.to_json()}, options.json, lambda _: print_preview(preview))
        beside = existing_ancestor(Path(options.output).parent)
        merged, adapters = run_recipe(recipe, Workplace(**places, spill=beside, progress=progress))
        made = None if options.report is None else reporting.measured(merged, adapters, options, name=options.output)
        with working("writing"):
            written = io.save(merged, options.output, force=options.force, **conversion(recipe))
        if made is not None:
            reporting.save(made, options, "the adapter is written")
        merged = jax.tree.map(seen_everywhere, merged)
    except (ValueError, OSError, MemoryError) as error:
        return report_error(error, options.json)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return report_error(MemoryError(), options.json)
    summary = summarise(options.output, recipe, adapters, merged, written)
    return report(summary, options.json, print_summary) if first_process() else 0


def target_problems(options: argparse.Namespace, recipe: Recipe, adapters: list[Adapter]) -> list[str]:
    """Whether the output may be written, and can hold what the adapters are merged into."""
    output: Any = io.as_path(options.output)
    problems = []
    if not str(output).isprintable():
        problems.append(f"{str(output)!r}: has characters in its name that cannot be written down")
    problems += io.overlap_problems([io.as_path(path) for path in files(recipe)], output)
    if is_recipe(options.adapters[0]):
        own = Path(options.adapters[0])
        if own.resolve() == Path(options.output).resolve() / RECIPE and not is_ours(own):
            problems.append(f"{own}: lies where the recipe of the result goes, and would be overwritten")
    try:
        wanted = Conversion(**conversion(recipe))
        io.check_target(adapters or [Adapter({})], output, wanted, options.force)
    except ValueError as error:
        problems += str(error).splitlines()
    return problems
