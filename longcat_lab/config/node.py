from longcat_lab.node import ConfigError, InnerNodeError, Node, nearest, validate_node  # noqa: F401
