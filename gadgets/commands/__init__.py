"""The subcommands of `slicediff`, one file each: the arguments, and what it does."""
