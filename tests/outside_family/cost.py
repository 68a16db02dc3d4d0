from sft.cost.idefics3.cost import read_model

__all__ = ["read_model"]
