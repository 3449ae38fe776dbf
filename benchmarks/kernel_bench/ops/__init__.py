"""The ops that are compared: arguments, shapes and references."""
