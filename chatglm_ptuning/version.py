"""The version of the kit, which results and checkpoints record."""

from importlib.metadata import PackageNotFoundError, version


def kit_version() -> str | None:
    """The installed version of this package; None when it runs uninstalled from its sources."""
    try:
        return version("chatglm-ptuning")
    except PackageNotFoundError:
        return None
