"""What a saved folder holds besides weights, so that transformers or PEFT alone open it, on another machine too."""

from __future__ import annotations

import json
from pathlib import Path

from transformers import GenerationConfig, PreTrainedConfig

from sft.core.shipped import is_local
from sft.models.chat_template import ChatTemplate
from sft.models.family import Family
from sft.models.packed_model import PackedModel


def save_processor(family: Family, template: ChatTemplate, config: PreTrainedConfig, folder: Path) -> None:
    """Write processor, tokenizer and chat template, and generation_config.json with every token that ends an answer."""
    tokenizer = template.tokenizer
    tokenizer.chat_template = template.template
    family.weights.save_processor(tokenizer, config, folder)
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"  # transformers 4 knows the class by its old name alone
    file.write_text(file.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))
    ends = tokenizer.convert_tokens_to_ids([token for token in family.text.ENDS if token in tokenizer.get_vocab()])
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, eos_token_id=ends
    ).save_pretrained(folder)


def make_portable(model: PackedModel, folder: Path) -> None:
    """Make a folder of adapters one that `AutoPeftModel` opens, and write in README.md how.

    Where it sees a tokenizer_config.json, peft 0.21 compares the tokenizer with the base rows of the embedding alone
    and calls `resize_token_embeddings`, which destroys the extra rows of IDEFICS: logits were 10.7 apart. transformers
    takes the same settings from special_tokens_map.json.
    """
    file = folder / "tokenizer_config.json"
    names = ("bos_token", "eos_token", "unk_token", "pad_token", "padding_side", "model_max_length")
    settings = {name: value for name, value in json.loads(file.read_text()).items() if name in names}
    (folder / "special_tokens_map.json").write_text(json.dumps(settings, indent=2) + "\n")
    file.unlink()
    base = str(model.peft_config["default"].base_model_name_or_path)
    name, tag = (Path(base).name, "") if is_local(base) else (base, f"\nbase_model: {base}")
    rows = getattr(model.config, "additional_vocab_size", 0)  # of IDEFICS; a published base may have one fewer
    room = f", additional_vocab_size={rows}, ignore_mismatched_sizes=True" if rows else ""
    (folder / "README.md").write_text(_CARD.format(name=name, tag=tag, room=room), encoding="utf-8")


_CARD = """---
library_name: peft{tag}
---
# Adapters for {name}

```python
from peft import AutoPeftModel
from transformers import AutoProcessor

folder = "."  # this folder, whose adapter_config.json names the base
model = AutoPeftModel.from_pretrained(folder, dtype="float32"{room})
processor = AutoProcessor.from_pretrained(folder)
```

The adapters hold the rows of all added tokens. The published base may have fewer, so it is loaded with room for them.
transformers prints MISMATCH for these rows; they are then filled from the adapters.

If the base is elsewhere, load it from there and give it to PEFT, in place of the line with `AutoPeftModel`:

```python
import peft, transformers
base = transformers.AutoModelForImageTextToText.from_pretrained("BASE", dtype="float32"{room})
model = peft.PeftModel.from_pretrained(base, folder)  # over BASE, a folder or a hub id
```
"""
