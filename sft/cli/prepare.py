"""`idefics-sft prepare RECIPE`: raw files -> stores, token ids, the base with its full vocabulary."""

import shlex

from sft.cli.terminal import Json, Overrides, RecipeName, console, print_json, progress, quiet_libraries


def run(recipe: RecipeName, overrides: Overrides = None, json: Json = False) -> None:
    """Prepare the datasets of a recipe and its base model."""
    from sft.naming import find_recipe

    found = find_recipe(recipe, overrides or ())
    quiet_libraries()
    from sft import run as runs
    from sft.scoring import recipe_benchmark

    out = console(to_stderr=json)
    with progress("preparing", None, out) as update:
        sources = runs.prepare(found, lambda name, records: update(records, name))
    recipe_benchmark(found)
    stores = [part.store for own in sources.parts for part in own]
    if json:
        print_json({"stores": [{"path": str(s.path), "samples": len(s), "images": s.num_images} for s in stores]})
        return
    for store in stores:
        out.print(f"{store.path}: {len(store):,} samples, {store.num_images:,} images")
    arguments = shlex.join([recipe, *(overrides or ())])
    out.print(f"Next: idefics-sft mix {arguments}, or idefics-sft train {arguments}")
