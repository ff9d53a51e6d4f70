"""Which source a configuration names. Each is imported when it is asked for: their libraries are not light."""

from __future__ import annotations

from longcat_lab.config.data import DataConfig
from longcat_lab.data.documents import TextSource


def open_source(config: DataConfig) -> TextSource:
    """The source that `config.source.kind` names."""
    if config.source.kind == "files":
        from longcat_lab.data.files import FileSource

        return FileSource(config.source)
    if config.source.kind == "huggingface":
        from longcat_lab.data.huggingface import HuggingFaceSource

        return HuggingFaceSource(config.source)
    from longcat_lab.data.python_packages import PackageSource

    return PackageSource(config)
