"""The subcommands of `fmray`, one module each, with `add_arguments` and `run`."""
