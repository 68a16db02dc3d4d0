import functools

import numpy as np
import torch
from transformers import Idefics3ForConditionalGeneration

from sft.models.packed_model import PackedModel, sample_groups


def image_token_ids(tokenizer, num_tiles):
    fake, image = tokenizer.convert_tokens_to_ids(["<fake_token_around_image>", "<image>"])
    return [*[fake, *[image] * 4] * num_tiles, fake]


def normalise(tiles):
    return tiles.float() / 127.5 - 1


class PackedInline(PackedModel, Idefics3ForConditionalGeneration):
    shard_units = ("Idefics3EncoderLayer", "LlamaDecoderLayer")

    def set_attention(self):
        self.config._attn_implementation = "grouped"
        self.config.text_config._attn_implementation = "grouped"
        self.config.vision_config._attn_implementation = "sdpa"
        return self

    @functools.wraps(Idefics3ForConditionalGeneration.forward)
    def forward(self, *args, batch=None, read_P=None, z_loss=0.0, **kwargs):
        if batch is None:
            return super().forward(*args, **kwargs)
        return self.packed_forward(batch, read_P, z_loss)

    def encode_images(self, tiles):
        (tiles_KCHW,) = tiles
        side = tiles_KCHW.shape[-1] // self.config.vision_config.patch_size
        grid = torch.ones(len(tiles_KCHW), side, side, dtype=torch.bool)
        pixels = normalise(tiles_KCHW).to(self.dtype)
        hidden = self.model.vision_model(pixel_values=pixels, patch_attention_mask=grid).last_hidden_state
        return self.model.connector(hidden).flatten(0, 1)

    def hidden_states(self, batch, read_P):
        embeds_TD = self.model.text_model.embed_tokens(batch.input_ids_T)
        states_RE = self.image_states(batch)
        if states_RE is not None:
            (places,) = torch.where(batch.state_ids_T >= 0)
            states_PE = states_RE[batch.state_ids_T[places]].to(embeds_TD.dtype)
            embeds_TD = embeds_TD.index_put((places,), states_PE) + 0 * states_RE.sum()  # a dummy's too: equal calls
        output = self.model.text_model(
            inputs_embeds=embeds_TD[None],
            attention_mask=embeds_TD.new_zeros(1, 1, 1, 1),
            position_ids=batch.position_ids_T[None],
            use_cache=False,
            groups=sample_groups(batch),
        )
        return output.last_hidden_state[0, read_P]

    def plain_logits(self, batch, segment):
        own_T = batch.segment_ids_T == segment
        starts = np.cumsum([0, *batch.num_states])
        shown = [
            int(np.flatnonzero(starts == state)[0])
            for state in batch.state_ids_T[own_T].tolist()
            if state in starts[:-1]
        ]
        per_image = torch.cat(batch.tiles).split(batch.num_tiles) if shown else ()
        pixels = {"pixel_values": normalise(torch.cat([per_image[image] for image in shown]))[None]} if shown else {}
        self.config.text_config._attn_implementation = "sdpa"
        try:
            return self(input_ids=batch.input_ids_T[own_T][None], use_cache=False, **pixels).logits[0]
        finally:
            self.set_attention()

    def generation_inputs(self, prompts, tiles):
        laid = [np.concatenate(images) if images else np.zeros((0, 3, 32, 32), np.uint8) for images in tiles]
        most = max(map(len, laid))
        if not most:
            return {}
        pixels = torch.zeros(len(laid), most, 3, 32, 32)  # transformers leaves out tiles that are 0 everywhere
        for row, own in enumerate(laid):
            pixels[row, : len(own)] = normalise(torch.from_numpy(own))
        return {"pixel_values": pixels}
