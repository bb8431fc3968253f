"""Datasets on a hub, Hugging Face or ModelScope, as rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from urllib.parse import parse_qsl

from chatglm_ptuning.data.sources.rows import BadRows, Row, plain_value
from chatglm_ptuning.model.hub import HUBS

_OPTIONS = ("config", "split", "revision")


def is_on_hub(name: str) -> bool:
    """Whether a name refers to a dataset on a hub."""
    return name.partition(":")[0] in HUBS


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset, downloaded once and then read from the local cache of the hub's client.

    Attributes:
        hub: one of `HUBS`.
        repository: `OWNER/NAME`, or a local copy of such a repository; "" for the repository that a task names.
        config: name of the subset.
        split: None if the name does not say.
    """

    hub: str
    repository: str
    config: str | None = None
    split: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubDataset:
        """Reads `HUB:OWNER/NAME?config=CONFIG&split=SPLIT&revision=REVISION`; only the hub is required.

        Raises:
            ValueError: if the name has another form.
        """
        hub, _, rest = name.partition(":")
        repository, _, query = rest.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        if hub not in HUBS or any(option not in _OPTIONS for option in options):
            raise ValueError(
                f"{name}: a dataset on a hub is written {' or '.join(f'{hub}:OWNER/NAME' for hub in HUBS)}, "
                "optionally with ?config=CONFIG&split=SPLIT&revision=REVISION."
            )
        return cls(hub, repository, **options)

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}"

    def rows(self, bad_rows: BadRows, *, json_in_text: bool = False) -> Iterator[Row]:
        """Its rows, numbered from 1. Class numbers become class names, and the number -1 (no class) becomes None.

        Args:
            bad_rows, json_in_text: as for files; the rows of a hub are never bad, nor JSON in a text file.

        Raises:
            ValueError, ImportError: as `content`.
        """
        for number, values in enumerate(self.content, start=1):
            yield Row(_decoded(values, self.content.features), str(self), number, has_lines=False)

    def fingerprint(self) -> str:
        """The fingerprint that `datasets` gives the content."""
        return str(self.content._fingerprint)

    @cached_property
    def content(self) -> Any:
        """The `datasets.Dataset`.

        Raises:
            ValueError: if the dataset cannot be downloaded, saying what to do offline.
            ImportError: if the hub's client is not installed.
        """
        try:
            return self._download(self.split or "train")
        except ImportError:
            raise
        except Exception as error:  # the clients raise errors of many libraries
            raise ValueError(
                f"{self} cannot be downloaded: {first_line(error)}\nWithout a connection, download it elsewhere "
                f"(`hf download --repo-type dataset {self.repository}`) and name its files or folder instead."
            ) from error

    def _download(self, split: str) -> Any:
        if self.hub == "huggingface":
            import datasets

            return datasets.load_dataset(self.repository, self.config, split=split, revision=self.revision)
        try:
            from modelscope.msdatasets import MsDataset
        except ImportError as error:
            raise ImportError(
                f"{error}; install the package with its extra: pip install 'chatglm-ptuning[modelscope]'."
            ) from error
        version = {} if self.revision is None else {"version": self.revision}
        data = MsDataset.load(self.repository, subset_name=self.config or "default", split=split, **version)
        return data if hasattr(data, "features") else data.to_hf_dataset()


def first_line(error: Exception) -> str:
    """The first line of an error message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _decoded(row: Mapping[str, Any], features: Mapping[str, Any]) -> dict[str, Any]:
    decoded = {name: plain_value(value) for name, value in row.items()}
    for name, feature in features.items():
        inner = getattr(feature, "feature", feature)
        if not hasattr(inner, "int2str"):
            continue
        value = row[name]
        if isinstance(value, list):
            decoded[name] = [inner.int2str(entry) for entry in value]
        else:
            decoded[name] = None if value is None or value < 0 else inner.int2str(value)
    return decoded
