"""`idefics-sft schema`: the JSON schema of a recipe, for editors."""

import sys

EXAMPLES = ("schema > recipe.schema.json      # for the recipe that names it",)


def run() -> None:
    """Print the JSON schema of a recipe, by which editors complete keys and mark mistakes."""
    from sft.recipe.json_schema import schema_text

    sys.stdout.write(schema_text())
