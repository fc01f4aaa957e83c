"""``python -m reparam_export``."""

from reparam_export.cli import main

main()
