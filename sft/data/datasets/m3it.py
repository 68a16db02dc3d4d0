"""M3IT: instructions over 40 public datasets, images as base64 inside the rows; `MMInstruction/M3IT` on the hub.

Raw layout: `data/<task>/<subset>/<split>.jsonl` with `instructions.json` (or `instruction.json`) beside it, a list of
about ten wordings. Rows come in two forms, told apart by the field `instruction`:

    loader form  {"instruction": …, "inputs": …, "image_base64_str": [base64], "outputs": …}, JSON lines or parquet; the
                 parquet copy HuggingFaceM4/M3IT holds the image as {"bytes": …} under `image`
    raw form     other fields in each subset, joined into sentences by the published loader, M3IT.py. It no longer runs
                 (datasets 4 dropped such scripts), so its templates are in `_m3it_templates.py`

Without `subsets` these are the 25 English single-image subsets that IDEFICS was tuned on (create_m3it.py of
HuggingFaceM4: no Chinese, video, translation or several images), and all of them have to be there.

What the templates rest on. The loader was read in pieces, from its published history. Seen there: the fields and
sentences of coco, shapes, okvqa, a-okvqa, vqa-v2, text-vqa, st-vqa (the block tells no name, its place does), mocheg,
vsr, coco-goi, nlvr, vist and winoground, the ten options of imagenet, and most of viquae, coco-text, coco-itm and
snli-ve. mocheg, vsr and coco-text later got lettered options, whose answers were not seen: the earlier wording is used.
From memory: `mapping.txt` as "n01440764 tench, Tinca tinca" with `label` its line or its id, `gold_label` in snli-ve,
and the general rule for what is not named above. A field that is not as expected is counted as a bad record, so a wrong
memory shows as a dirty source and not as wrong text.

Known defects: some science-qa questions have no image (they become text); answers end in blanks and newlines;
`train_2023-10-08.jsonl` and its like hold the `-rephrased` subsets, which say their base subset again.
"""

import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from sft.core.errors import UserError, nearest
from sft.core.images import base64_image
from sft.core.sample import ImageRef, Sample, SkipSample, question_and_answer
from sft.data.datasets._m3it_templates import TEMPLATES, general, text_of
from sft.data.datasets._meaning import Keys
from sft.data.formats import Row, read_json, read_records

LICENCE = "other: every subset keeps the licence of its source"
KEYS = Keys.of("instruction inputs outputs meta image_base64_str image_str img_str image_base64 image images")

OF_TEMPLATES = {"question", "inputs", "input", "context", "answer", "outputs", "output", "caption", "response"}
OF_TEMPLATES |= {"paraphrased_answer", "original_answer", "rationale", "gold_label", "hypothesis", "sentences"}
"""Fields of the raw form that become text."""

SELECTION = (
    *("coco", "textcap", "image-paragraph-captioning"),
    *("coco-goi", "coco-text", "imagenet", "coco-itm", "snli-ve", "mocheg", "iqa"),
    *("vqa-v2", "shapes", "docvqa", "ocr-vqa", "st-vqa", "text-vqa", "gqa"),
    *("okvqa", "a-okvqa", "science-qa", "viquae"),
    *("clevr", "vcr", "visual-mrc", "visual-dialog"),
)
OTHERS = (
    *("imagenet-open-ended", "vsr", "refcoco", "nlvr", "winoground", "vist", "multi30k"),
    *("coco-cn", "flickr8k-cn", "fm-iqa", "mmchat"),
    *("ss", "msrvtt", "msrvtt-qa", "msvd-qa", "ivqa", "activitynet-qa"),
)
FOLDERS = {"coco-itm": "itm", "vqa-v2": "vqav2", "imagenet-open-ended": "imagenet"}
SPLITS = {"val": "val|validation", "validation": "val|validation"}
VERSIONS = ("_v2", "_new", ".large", "")
"""Of one split, best first: what was uploaded again is the repaired one; okvqa's answers are only in `_v2`."""

IMAGE_FIELDS = ("image_base64_str", "image_str", "img_str", "image_base64", "image", "images")
MAX_DOCVQA_CHARACTERS = 1_000_000  # of base64; create_m3it.py: "Keeps 23097/39463"


def files(path: Path, split: str, *, subsets: list[str] | None = None) -> list[Path]:
    """Return the files of the chosen subsets. `path` is the dataset, its `data`, one subset's folder, or one file.
    Raise UserError for a subset that is unknown, or whose files are not there."""
    chosen = _chosen(subsets)
    if path.is_file():
        return [path]
    root = path / "data" if (path / "data").is_dir() else path
    if (subsets is None or len(subsets) == 1) and (own := _split_files(root, split)):
        return own
    found = {name: _subset_files(root, name, split) for name in chosen}
    if missing := [name for name in chosen if not found[name]]:
        there = ", ".join(name for name in chosen if found[name])
        cure = f"; to train on the others alone, set subsets: [{there}]" if there else ""
        expected = f"<task>/<subset>/ folders with {split}.jsonl or a known variant of that name"
        raise UserError(f"{path}: no {split} file of the M3IT subsets {', '.join(missing)}; expected {expected}{cure}")
    return [file for name in chosen for file in found[name]]


def _chosen(subsets: list[str] | None) -> Sequence[str]:
    """Return the subsets asked for, checked."""
    if subsets is None:
        return SELECTION
    for name in subsets:
        if name.endswith("-rephrased"):
            base = name.removesuffix("-rephrased")
            raise UserError(f"m3it: subset {name!r} says the rows of {base!r} again in other words; take {base!r}")
        if name not in SELECTION + OTHERS:
            known = ", ".join(SELECTION + OTHERS)
            raise UserError(f"m3it: unknown subset {name!r}{nearest(name, SELECTION + OTHERS)} (known: {known})")
    if not subsets or len({FOLDERS.get(name, name) for name in subsets}) < len(subsets):
        raise UserError(f"m3it: subsets is {subsets}; expected one or more, and none whose rows are there twice")
    return subsets


def _folder_names(name: str) -> tuple[str, str]:
    """Return the folder names that a subset may have: science-qa lies in `science_qa`, a-okvqa in `a-okvqa`."""
    folder = FOLDERS.get(name, name)
    return folder, folder.replace("-", "_")


def _subset_files(root: Path, name: str, split: str) -> list[Path]:
    """Return the files of a subset in the first folder that has the split: iqa was moved between tasks."""
    folders = [folder for each in _folder_names(name) for folder in (root / each, *sorted(root.glob(f"*/{each}")))]
    return next((found for folder in folders if (found := _split_files(folder, split))), [])


def _split_files(folder: Path, split: str) -> list[Path]:
    """Return the one JSON-lines file of a split in its best version, else the parquet files of the split."""
    words = SPLITS.get(split, re.escape(split))
    names = sorted(file.name for file in folder.iterdir()) if folder.is_dir() else []
    for version in VERSIONS:
        found = [name for name in names if re.fullmatch(rf"(.+_)?({words}){re.escape(version)}\.jsonl", name)]
        if len(found) > 1:
            raise UserError(f"{folder}: {' and '.join(found)} could both be the {split} split; expected one of them")
        if found:
            return [folder / found[0]]
    return [folder / name for name in names if re.fullmatch(rf"(.+[_-])?({words})(-\d+-of-\d+)?\.parquet", name)]


def beside(file: Path) -> list[Path]:
    """Return the files of instructions and class names."""
    names = ("instructions.json", "instruction.json", "mapping.txt")
    return [path for name in names if (path := file.with_name(name)).is_file()]


def rows(file: Path, split: str, *, subsets: list[str] | None = None, seed: int = 0) -> Iterator[Row | SkipSample]:
    """Yield the rows of a file, those of the raw form brought into the loader form; `seed` and its key draw a row's
    instruction and the order of its options. Raise UserError where the file of instructions or classes is missing."""
    subset = subsets[0] if subsets and len(subsets) == 1 else _subset_of(file)
    instructions: list[str] = []
    for row in read_records(file):
        if isinstance(row, SkipSample):
            yield SkipSample(row.reason, detail=row.detail, where=f"{subset}/{row.where}")
            continue
        here = f"{subset}/{row['__from__']}"
        row |= {"__subset__": subset, "__key__": f"m3it/{here}", "__from__": here}
        if "instruction" in row:
            yield row
            continue
        if not instructions:
            instructions = _instructions(file, subset)
            classes = _classes(file) if subset.startswith("imagenet") else {}
        for one in _captions(row) if subset == "coco" else [row]:
            rng = random.Random(f"{seed}/{one['__key__']}")
            try:
                yield _loader_form(one | {"__rng__": rng, "__classes__": classes}, rng.choice(instructions))
            except SkipSample as skip:
                yield SkipSample(skip.reason, detail=skip.detail, where=here)


def _loader_form(row: Row, instruction: str) -> Row:
    """Return what M3IT.py made of a raw row."""
    subset = row["__subset__"]
    inputs, outputs = TEMPLATES.get(subset, general)(row)
    if subset in ("mocheg", "vsr"):
        instruction += " Options: True or False."
    if "[HYPO]" in instruction:  # snli-ve: the sentence stands inside the instruction
        instruction, inputs = instruction.replace("[HYPO]", inputs), ""
    of_template = OF_TEMPLATES | ({"label"} if subset.startswith("imagenet") else set())
    kept = {name: value for name, value in row.items() if name not in of_template}
    return kept | {"instruction": instruction, "inputs": inputs, "outputs": outputs}


def _subset_of(file: Path) -> str:
    """Return the subset of a file by the name of its folder."""
    folder = file.parent.name
    return next((name for name in SELECTION + OTHERS if folder in _folder_names(name)), folder)


def _instructions(file: Path, subset: str) -> list[str]:
    if subset not in SELECTION + OTHERS:
        raise UserError(f"{file}: raw rows, and no M3IT subset is named {subset!r}; say which with subsets: [name]")
    for name in ("instructions.json", "instruction.json"):
        if (path := file.with_name(name)).is_file():
            instructions = read_json(path)
            if not isinstance(instructions, list) or not all(isinstance(one, str) and one for one in instructions):
                raise UserError(f"{path}: expected a list of instructions")
            if instructions:
                return instructions
    raise UserError(f"{file}: its rows need instructions; expected instructions.json with some beside it")


def _classes(file: Path) -> dict[str, str]:
    """Return the class names of imagenet, by WordNet id, in the order of their numbers."""
    path = file.with_name("mapping.txt")
    if not path.is_file():
        raise UserError(f"{path}: file not found; expected the class names of imagenet")
    classes = dict(re.findall(r"^(n\d{8})\s+(\S.*?)\s*$", path.read_text("utf-8", "replace"), flags=re.MULTILINE))
    if len(classes) < 2:
        raise UserError(f"{path}: expected lines like 'n01440764 tench, Tinca tinca'")
    return classes


def _captions(row: Row) -> list[Row]:
    """Return five rows for the five captions of a coco image."""
    meta = row.get("meta")
    captions = meta.get("targets") if isinstance(meta, dict) else None
    if not isinstance(captions, list) or not captions:
        return [row]  # has no caption, and is left out for it
    return [row | {"__key__": f"{row['__key__']}/{number}", "caption": one} for number, one in enumerate(captions, 1)]


def to_sample(row: Row, path: Path) -> Sample:
    """Return one question and its answer."""
    instruction, inputs, outputs = (text_of(row, name) for name in ("instruction", "inputs", "outputs"))
    question = "\n".join(text.strip() for text in (instruction, inputs) if text.strip())
    if not question or not outputs.strip():
        raise SkipSample("empty message")
    return Sample(key=row["__key__"], messages=question_and_answer((*_images(row), question), outputs.strip()))


def _images(row: Row) -> Iterator[ImageRef]:
    """Yield the images of a row; one in the subsets of the selection, or none in science-qa."""
    subset = row["__subset__"]
    if not any(field in row for field in IMAGE_FIELDS):
        raise SkipSample("no image field")
    value = next((row[field] for field in IMAGE_FIELDS if row.get(field)), None)
    encoded = value if isinstance(value, list) else [value]
    if not any(encoded):
        if subset in SELECTION + OTHERS and subset != "science-qa":
            raise SkipSample("no image")
        return
    if subset in SELECTION and len(encoded) > 1:  # create_m3it.py stops at such a row
        raise SkipSample("more than one image")
    for one in encoded:
        if subset == "docvqa" and isinstance(one, str) and len(one) > MAX_DOCVQA_CHARACTERS:
            raise SkipSample("image over 1,000,000 characters of base64", filtered=True)
        yield _image(one)


def _image(encoded: object) -> ImageRef:
    if not isinstance(encoded, dict):
        return base64_image(encoded)
    if not isinstance(content := encoded.get("bytes"), bytes):
        raise SkipSample("image has no bytes")
    return ImageRef(source=content)
