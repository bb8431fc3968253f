"""A folder for the PYTHONPATH of vLLM, which has an environment without this kit."""
