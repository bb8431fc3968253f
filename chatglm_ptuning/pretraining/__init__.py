"""Pre-training of chatglm-nano, the small base that is bundled with the kit."""
