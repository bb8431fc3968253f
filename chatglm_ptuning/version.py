"""Which version of the kit runs; results and checkpoints record it."""

from importlib.metadata import PackageNotFoundError, version


def kit_version() -> str | None:
    """The installed version of this package; None when it runs uninstalled from its sources."""
    try:
        return version("chatglm-ptuning")
    except PackageNotFoundError:
        return None
