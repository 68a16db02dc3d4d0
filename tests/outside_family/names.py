from sft.models.idefics3.names import ENCODER_GROUPS, GROUPS, LORA_TARGETS

__all__ = ["ENCODER_GROUPS", "GROUPS", "LORA_TARGETS"]
