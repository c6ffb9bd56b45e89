"""The command line: options, tables, progress and exit codes around ``GHNClient``."""
