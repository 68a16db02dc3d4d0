from dataclasses import dataclass

import torch
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from inline_family.family import InlineImages
from sft.cost.family import Cost
from sft.cost.memory import Inventory, Stage, peak_memory
from sft.cost.model_config import load_model_config

TOKENS_OF_TILE = 5


def read_model(path):
    return InlineCost(Idefics3Config.from_dict(load_model_config(path, "idefics3", {})))


@dataclass(frozen=True)
class InlineCost:
    config: Idefics3Config

    @property
    def parameters(self):
        with torch.device("meta"):
            return sum(weight.numel() for weight in Idefics3ForConditionalGeneration(self.config).parameters())

    def trained_parameters(self, setting):
        return self.parameters

    def cost(self, setting):
        text, weights, tiles = self.config.text_config, self.parameters, setting.image_weight
        head = text.vocab_size * text.hidden_size
        kept = 34 * setting.stream_bytes * setting.tokens * text.hidden_size * text.num_hidden_layers
        inventory = Inventory(
            parameters=weights, trained=weights, trained_embedding=head, trained_head=head, trained_lines=weights,
            frozen_exact=0, frozen_half=0, frozen_four_bit=0, vocabulary=text.vocab_size, head=head,
            largest_layer=0, copies=0, inputs=3 * 32 * 32 * tiles, stages=[Stage(kept, 0, weights - head, 0, False)],
        )  # fmt: skip
        return Cost(peak_memory(inventory, setting), 6 * weights * setting.tokens)

    def lora_layers(self, targets):
        return ("language",)

    def fullest_images(self, tokens, image_weight):
        tiles = min(image_weight, tokens // TOKENS_OF_TILE)
        return -(-tiles // 7), tiles

    def feature_bytes(self, width, height):
        images = InlineImages(self.config)
        return 2 * images.num_states(images.tiling(width, height)) * images.state_size
