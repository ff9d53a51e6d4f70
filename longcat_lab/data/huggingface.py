"""Text of a Hugging Face dataset, streamed until the caps are reached."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from longcat_lab.config.data import HuggingFace
from longcat_lab.data.documents import Document, Tally
from longcat_lab.data.files import checked_text
from longcat_lab.errors import LabError


class HuggingFaceSource:
    """Documents of `huggingface`, in the dataset's order; validation is held out of them."""

    def __init__(self, source: HuggingFace) -> None:
        self.source = source

    def identity(self) -> dict[str, Any]:
        """The dataset's name and revision are in the configuration already; asking the hub for more would need a network every time."""
        return {}

    def documents(self, tally: Tally) -> Iterator[Document]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise LabError(
                "data.source.kind=huggingface needs the package 'datasets': install it (pip install datasets), "
                "or choose data.source.kind=python_packages."
            ) from None
        name = self.source.name
        try:
            rows = load_dataset(name, self.source.config, split=self.source.split, streaming=True, revision=self.source.revision)
            for row in rows:
                text = checked_text(row, self.source.text_field, f"The dataset {name}")
                if text is None or not text.strip():
                    tally.skipped["no text"] += 1
                else:
                    yield Document(name, text)
        except LabError:
            raise
        except Exception as error:  # the library raises its own types, the file system's and three HTTP clients' here
            cause = (str(error) or type(error).__name__).splitlines()[0]
            raise LabError(
                f"The dataset {name} cannot be read ({cause}): check its name and the network, or choose data.source.kind=python_packages."
            ) from error
