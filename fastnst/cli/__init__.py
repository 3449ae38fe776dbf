"""The command line, one file per command group. torch is imported inside the commands only."""
