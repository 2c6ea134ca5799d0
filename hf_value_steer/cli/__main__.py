"""`python -m hf_value_steer.cli`, for launchers that take a module."""

import sys

from hf_value_steer.cli import main


sys.exit(main())
