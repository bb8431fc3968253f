"""`chatglm-ptuning lm_eval`: examinations and other tasks through lm-evaluation-harness."""
