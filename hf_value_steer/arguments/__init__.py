"""What commands, recipes and functions are told: dataclasses that import nothing heavy, so that `--help` is quick."""
