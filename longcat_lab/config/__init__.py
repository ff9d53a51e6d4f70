"""What a run is: nodes with strict keys, presets, YAML files and dotted overrides."""

from longcat_lab.config.data import DataConfig
from longcat_lab.config.model import ModelConfig
from longcat_lab.config.parallel import ParallelConfig
from longcat_lab.config.run import RunConfig, apply, load, presets
from longcat_lab.config.training import ConversionConfig, OptimizerConfig, ScheduleConfig, TrackingConfig, TrainingConfig
from longcat_lab.config.yaml import read_yaml, write_yaml
from longcat_lab.node import ConfigError, Node

__all__ = [
    "ConfigError",
    "ConversionConfig",
    "DataConfig",
    "ModelConfig",
    "Node",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrackingConfig",
    "TrainingConfig",
    "apply",
    "load",
    "presets",
    "read_yaml",
    "write_yaml",
]
