"""`idefics-sft inspect RECIPE`: one pack as the model sees it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, Group
from rich.text import Text

from sft.cli.terminal import Json, Overrides, RecipeName, console, percent, print_json, quiet_libraries, table

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")  # escapes, changes of direction
TRAINED, PLAIN, SPECIAL, IMAGE, PROBLEM = "black on yellow", "", "cyan", "bold magenta", "bold red"
EXAMPLES = (
    "inspect my-data.yaml --source mine",
    "inspect my-data.yaml --pack 7 --html pack.html",
)


def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    pack: Annotated[int, typer.Option(help="Which pack of the run, counted from 0.")] = 0,
    source: Annotated[str | None, typer.Option(help="The first pack, from --pack on, with a sample of it.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page for the browser instead.")] = None,
    json: Json = False,
) -> None:
    """Show one pack as the model sees it: what is trained, where samples end, which image each token looks at."""
    from sft.runs.names import find_recipe

    found = find_recipe(recipe, overrides or ())
    quiet_libraries()
    from sft.batches.inspect_pack import inspect_pack, page
    from sft.data.prepare import open_prepared

    sources, template = open_prepared(found, [recipe, *(overrides or ())])
    description = inspect_pack(found, sources, template, number=pack, source=source)
    if html:
        html.write_text(page(description), encoding="utf-8")
        console(to_stderr=json).print(f"{html}: {headline(description)}", markup=False)
    if json:
        print_json(description)
    elif not html:
        show(description, console())


def headline(description: dict[str, Any]) -> str:
    """Return a pack in a line."""
    figures = description["figures"]
    return (
        f"pack {description['pack']}, drawn for step {description['step']:,} of {description['steps']:,}: "
        f"{figures['tokens']:,} of {description['sequence_length']:,} tokens ({percent(figures['fill'])}), "
        f"{figures['trained_tokens']:,} trained ({percent(figures['trained_share'])})"
    )


def show(description: dict[str, Any], out: Console) -> None:
    """Print the pack in colours; where there are none, trained tokens stand in ⟦brackets⟧."""
    coloured = out.color_system is not None and not out.no_color

    def put(*parts: tuple[str, str]) -> None:
        out.print(Text.assemble(*parts), soft_wrap=False)

    put((headline(description).capitalize(), "bold"))
    figures = description["figures"]
    images = f"images: {figures['images']:,}, of which {figures['distinct_images']:,} are distinct and encoded"
    put((f"samples: {figures['samples']:,}, {images}", "dim"))
    put(
        ("trained" if coloured else "⟦trained⟧", TRAINED if coloured else PLAIN),
        (" not trained ", PLAIN), ("<special> ", SPECIAL), ("[image 0: its size]", IMAGE),
        (" which the tokens of its sample look at from there on", "dim"),
    )  # fmt: skip
    if any(token["kind"] == "state" for token in description["tokens"]):
        out.print(_cuts(description["images"]))
    for sample in description["samples"]:
        tokens = description["tokens"][sample["start"] : sample["end"]]
        put(
            (f"\n{_visible(sample['key'])}", "bold"),
            (f"  {sample['source']}, {len(tokens):,} tokens, {sample['trained_tokens']:,} trained, ", "dim"),
            (f"positions {tokens[0]['position']} to {tokens[-1]['position']}", "dim"),
        )
        if sample["problem"]:
            put((f"not trained, since an image cannot be read any more: {_visible(sample['problem'])}", PROBLEM))
        put(*_sample(tokens, description["images"], coloured))
    unused = description["sequence_length"] - figures["tokens"]
    if unused > 0:
        put((f"\n{unused:,} tokens unused: nothing is padded in memory", "dim"))


def _cuts(images: Sequence[dict[str, Any]]) -> Group:
    """Return a table of how images that are tokens of the text are cut, and what each of them takes."""
    kinds = Counter((_cut(image), image["tokens"], image["work_in_tokens"]) for image in images)
    rows = [[str(count), cut, f"{tokens:,}", f"{work:,}"] for (cut, tokens, work), count in kinds.items()]
    return table("", ["images", "cut into", "tokens", "encoding is the work of text tokens"], rows)


def _cut(image: dict[str, Any]) -> str:
    tiles = "the whole and {rows}x{columns} tiles" if image["rows"] else "{width}x{height}"
    return tiles.format_map(image)


def _sample(tokens: list[dict[str, Any]], images: list[dict[str, Any]], coloured: bool) -> list[tuple[str, str]]:
    parts = []
    is_open = False
    for run in _runs(tokens):
        is_trained = run[0]["label"] is not None
        if is_trained != is_open and not coloured:
            parts.append(("⟦" if is_trained else "⟧", PLAIN))
        is_open = is_trained
        text, style = _text(run, images)
        parts.append((text, f"{style} {TRAINED}".strip() if is_trained else style))
    return [*parts, ("⟧", PLAIN)] if is_open and not coloured else parts


def _runs(tokens: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """Yield tokens that are shown as one: an image from its first state to its last, or, where tags between its tiles
    are trained, the states of a tile; every other token alone."""
    letters = {"image": "i", "state": "s"}
    kinds = "".join(letters.get(token["kind"], "t" if token["label"] is None else "T") for token in tokens)
    return (tokens[slice(*run.span())] for run in re.finditer("i[st]*s|s+|.", kinds))


def _text(run: list[dict[str, Any]], images: list[dict[str, Any]]) -> tuple[str, str]:
    token = run[0]
    if token["kind"] == "image":
        image = images[token["image"]]
        if image["problem"]:
            return f"[image {token['image']}: black, {_visible(image['problem'])}]", PROBLEM
        return f"[image {token['image']}: {_cut(image)}]", IMAGE
    if token["kind"] == "state":
        return f"{token['text']}×{len(run)}", SPECIAL
    if token["kind"] == "special":
        return token["text"], SPECIAL
    if not token["text"]:  # a byte of a character that a later token ends; the space a tokenizer puts before a text
        return ("" if token["name"] == "▁" else token["name"]), "dim"
    return _visible(token["text"]).replace("\n", "⏎\n"), PLAIN


def _visible(text: str) -> str:
    """Return a text that cannot steer a terminal."""
    return _STEERING.sub("�", text)
