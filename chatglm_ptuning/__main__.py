"""`python -m chatglm_ptuning`."""

from chatglm_ptuning.cli import main

if __name__ == "__main__":
    main()
