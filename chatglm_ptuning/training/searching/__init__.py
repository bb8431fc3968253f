"""`chatglm-ptuning search`: prompt length, learning rate and first values of a task."""
