"""P-Tuning v2 for ChatGLM2, ChatGLM3 and GLM-4."""
