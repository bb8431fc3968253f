"""Pre-training of chatglm-nano, the small base model that is bundled with the kit; see README.md in this folder."""
