"""The card's study of bias: generations of a model about people, the terms that differ between groups of them, and the
study of all prompts with its page."""
