"""The commands of `slicediff`, a file each: its arguments, and what it does."""
