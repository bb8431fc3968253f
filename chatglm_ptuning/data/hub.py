"""Datasets on the Hugging Face hub, as rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

from chatglm_ptuning.data.row import BadRows, Row

HUB_PREFIX = "hub:"


@dataclass(frozen=True)
class HubDataset:
    """One split of a dataset, fetched once and then read from the local cache of the `datasets` library.

    Attributes:
        name: as it was named, for messages.
    """

    name: str
    repository: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None

    @classmethod
    def parse(cls, name: str) -> HubDataset:
        """Reads `hub:OWNER/NAME?config=CONFIG&split=SPLIT&revision=REVISION`.

        Raises:
            ValueError: if it has another form.
        """
        repository, _, query = name.removeprefix(HUB_PREFIX).partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        unknown = [option for option in options if option not in ("config", "split", "revision")]
        if not repository or unknown:
            raise ValueError(
                f"{name}: a dataset on the hub is written hub:OWNER/NAME, optionally with "
                "?config=CONFIG&split=SPLIT&revision=REVISION."
            )
        return cls(name, repository, **options)

    def rows(self, bad_rows: BadRows) -> Iterator[Row]:
        """Its rows, numbered from 1.

        Raises:
            ValueError: if it cannot be fetched, saying what to do offline.
        """
        for number, values in enumerate(self._load(), start=1):
            yield Row(values, self.name, number, has_lines=False)

    def fingerprint(self) -> str:
        """What `datasets` knows the content by."""
        return str(self._load()._fingerprint)

    def _load(self) -> Any:
        import datasets

        try:
            return datasets.load_dataset(self.repository, self.config, split=self.split, revision=self.revision)
        except Exception as error:  # datasets raises errors of many libraries
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"{self.name} cannot be had from the hub: {reason}\nWithout a connection, fetch it elsewhere (`hf "
                f"download --repo-type dataset {self.repository}`) and name its files or folder instead."
            ) from error
