"""The `idefics-sft` command. One small file a command; heavy imports happen when a command runs."""
