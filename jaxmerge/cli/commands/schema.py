"""``jaxmerge schema``: the JSON schema of recipes."""

import argparse
import json
import sys
from typing import Any

DESCRIPTION = (
    "Print the JSON schema of recipes, by which editors complete and check them. An editor with YAML's language server "
    "reads the file that a comment names:"
)
EXAMPLES = """\
examples:
  jaxmerge schema > recipe.schema.json

first line of a recipe:
  # yaml-language-server: $schema=recipe.schema.json
"""


def add_parser(commands: Any) -> None:
    """Adds the command to those of the parser."""
    commands.add_parser("schema", help="print the JSON schema of recipes", description=DESCRIPTION, epilog=EXAMPLES)


def run(options: argparse.Namespace) -> int:
    """Prints the schema."""
    from jaxmerge.recipes.schema import recipe_schema

    del options
    sys.stdout.write(json.dumps(recipe_schema(), indent=2, ensure_ascii=False) + "\n")
    return 0
