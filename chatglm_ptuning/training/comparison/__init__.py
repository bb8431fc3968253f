"""`chatglm-ptuning compare`: ways of tuning on tasks, over seeds."""
