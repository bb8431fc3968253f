"""The entry of `python -m chatglm_ptuning`, the same as `chatglm-ptuning`."""

from chatglm_ptuning.cli import main

if __name__ == "__main__":
    main()
